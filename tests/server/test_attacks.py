"""What hostile clients do: they get a refusal, and everybody else an answer."""

import base64
import json
import os
import shutil
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.server import readers
from tests.server.conftest import PATIENCE, Live, until
from tests.server.process import start, workflow


@pytest.fixture
def http(live_model: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live_model.url, timeout=PATIENCE * 2) as client:
        yield client
        assert client.get("/ready").status_code == 200, "the server has survived"
        until(lambda: client.get("/prompt").json() == {"exec_info": {"queue_remaining": 0}}, "nothing is left behind")


def outcome(http: httpx.Client, prompt: Any, **more: Any) -> tuple[str, str]:
    """How a prompt ends, and why: "success", "error", or "refused" where it is not accepted."""
    answer = http.post("/prompt", json={"prompt": prompt} | more)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        return "refused", answer.text
    record = wait(http, answer.json()["prompt_id"])
    text = [about.get("exception_message", "") for _, about in record["status"]["messages"]]
    return record["status"]["status_str"], " ".join(text)


def wait(http: httpx.Client, id: str) -> dict[str, Any]:
    end = time.monotonic() + PATIENCE * 2
    while not (found := http.get(f"/history/{id}").json()):
        assert time.monotonic() < end
        time.sleep(0.02)
    record: dict[str, Any] = found[id]
    return record


def chained(
    node: str, inputs: Callable[[str], dict[str, Any]], length: int, *, after: str, into: tuple[str, str]
) -> Any:
    """A workflow in which `node` stands many times, one after the other."""
    prompt, last = workflow(seed=99, size=16, steps=1), after
    for number in range(length):
        prompt[f"n{number}"] = {"class_type": node, "inputs": inputs(last)}
        last = f"n{number}"
    prompt[into[0]]["inputs"][into[1]] = [last, 0]
    return prompt


BOMBS = {
    "a prompt of 220,000 letters": lambda: workflow("red circle " * 20_000),
    "a prompt of 80,000 tokens": lambda: workflow("\U0001f701" * 19_999),
    "latents repeated 64^4 times": lambda: chained(
        "RepeatLatentBatch", lambda of: {"samples": [of, 0], "amount": 64}, 4, after="5", into=("3", "latent_image")
    ),
    "latents 8^4 times as large": lambda: chained(
        "LatentUpscaleBy",
        lambda of: {"samples": [of, 0], "upscale_method": "bicubic", "scale_by": 8.0},
        4, after="5", into=("3", "latent_image"),
    ),
    "texts joined 2^20 times": lambda: chained(
        "ConditioningConcat",
        lambda of: {"conditioning_to": [of, 0], "conditioning_from": [of, 0]},
        20, after="6", into=("3", "positive"),
    ),
    "2^20 conditions": lambda: chained(
        "ConditioningCombine",
        lambda of: {"conditioning_1": [of, 0], "conditioning_2": [of, 0]},
        20, after="6", into=("3", "positive"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_workflows_that_want_all_memory_are_stopped_early(http: httpx.Client, bomb: str) -> None:
    """A prompt of 200 kB once took 23 GB, and the server with it."""
    how, why = outcome(http, BOMBS[bomb]())
    assert how == "error"
    assert " are the most" in why or "may be drawn" in why


@pytest.mark.parametrize(
    "number", ["1" + "0" * 400, "-1" + "0" * 400, "1e999", "-1e999", "NaN", "Infinity", "1e15", "true", '"1"', "[]"]
)
def test_places_in_the_queue_that_no_number_can_mean(http: httpx.Client, number: str) -> None:
    text = f'{{"number": {number}, "prompt": {json.dumps(workflow())}}}'
    assert http.post("/prompt", content=text).status_code == 400


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", '{"a": [1e400]}'])
def test_settings_that_no_json_can_say(http: httpx.Client, number: str) -> None:
    assert http.post("/settings/attack", content=number).status_code == 400
    assert http.post("/settings", content=f'{{"attack": {number}}}').status_code == 400
    assert http.get("/settings/attack").json() is None


def test_a_request_sent_again_is_one_prompt_whether_it_runs_or_is_over(http: httpx.Client) -> None:
    asked = {"json": {"prompt": workflow(seed=41), "prompt_id": "again"}, "headers": {"Idempotency-Key": "again"}}
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: http.post("/prompt", **asked), range(40)))  # type: ignore[arg-type]
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    assert {answer.json()["prompt_id"] for answer in answers} == {"again"}
    wait(http, "again")
    assert http.post("/prompt", **asked).json()["prompt_id"] == "again"  # type: ignore[arg-type]
    taken = http.post("/prompt", json=asked["json"])
    assert taken.status_code == 400, "without the key it is another request under the same id"


def test_of_many_prompts_with_one_id_one_is_accepted(http: httpx.Client) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = pool.map(
            lambda seed: http.post("/prompt", json={"prompt": workflow(seed=seed), "prompt_id": "wanted"}), range(40)
        )
        assert Counter(answer.status_code for answer in answers) == {200: 1, 400: 39}
    wait(http, "wanted")


@pytest.mark.parametrize("id", ["a\nb", "a\0b", "x" * 201, "\u202e", "a\r\nSet-Cookie: b", "\ud800"])
def test_ids_that_are_no_names(http: httpx.Client, id: str) -> None:
    assert http.post("/prompt", content=json.dumps({"prompt": workflow(), "prompt_id": id})).status_code == 400


@pytest.mark.parametrize(
    "prefix",
    ["../x", "/etc/x", "a/../../x", "a\0b", "x" * 300, "..", "x/..", "~/x", "C:\\x", "//x", "link/x", "\ud800"],
)
def test_pictures_are_saved_nowhere_else(live_model: Live, http: httpx.Client, tmp_path: Path, prefix: str) -> None:
    """Whatever becomes of it: refused, failed, or saved under a name within the output folder."""
    link = live_model.settings.output_dir / "link"
    link.symlink_to(tmp_path)
    around = {path for path in live_model.settings.output_dir.parent.glob("*") if path.is_file()}
    try:
        answer = http.post("/prompt", content=json.dumps({"prompt": workflow(name=prefix)}))
        assert answer.status_code in (200, 400)
        if answer.status_code == 200:
            record = wait(http, answer.json()["prompt_id"])
            for image in record["outputs"].get("9", {}).get("images", ()):
                path = live_model.settings.output_dir / image["subfolder"] / image["filename"]
                assert path.resolve().is_relative_to(live_model.settings.output_dir.resolve())
        assert not list(tmp_path.iterdir())
        assert {path for path in live_model.settings.output_dir.parent.glob("*") if path.is_file()} == around
    finally:
        link.unlink()


def test_a_storm_of_cancelling_loses_nothing(live_model: Live, http: httpx.Client) -> None:
    """Everything is cancelled from several sides at once, waiting and running; each ends once."""
    ids = [
        http.post("/prompt", json={"prompt": workflow(seed=500 + n, steps=300, name=f"storm{n}")}).json()["prompt_id"]
        for n in range(24)
    ]

    def cancel(number: int) -> None:
        way = number % 4
        if way == 0:
            http.post("/interrupt")
        elif way == 1:
            http.post("/queue", json={"delete": ids})
        elif way == 2:
            http.post(f"/jobs/{ids[number % len(ids)]}/cancel")
        else:
            http.post("/free", json={"unload_models": True, "free_memory": True})

    def live() -> bool:
        depth = live_model.state.queue.depth()
        return depth["queued"] + depth["running"] > 0

    end = time.monotonic() + PATIENCE * 2
    with ThreadPoolExecutor(8) as pool:
        while live():
            assert time.monotonic() < end
            list(pool.map(cancel, range(16)))
    stored = [job for id in ids if (job := live_model.state.queue.get(id)) is not None]
    assert {job.state for job in stored} <= {"cancelled"}
    assert outcome(http, workflow(seed=600))[0] == "success"


def test_jobs_that_share_nodes_survive_each_others_end(http: httpx.Client) -> None:
    """Eight prompts wait for the same sampling; those that began it are cancelled."""
    ids = []
    for number in range(8):
        prompt = workflow(seed=700, steps=60, name=f"shared{number}")
        ids.append(http.post("/prompt", json={"prompt": prompt}).json()["prompt_id"])
    for id in ids[:4]:
        http.post(f"/jobs/{id}/cancel")
    ends = [wait(http, id)["status"]["status_str"] for id in ids[4:]]
    assert ends == ["success"] * 4


@pytest.mark.parametrize("way", ["deleted", "a file"])
def test_without_its_output_folder_a_request_fails_or_makes_it_anew(
    live_model: Live, http: httpx.Client, way: str
) -> None:
    folder, away = live_model.settings.output_dir, live_model.settings.output_dir.with_name("away")
    folder.rename(away)
    try:
        if way == "a file":
            folder.write_text("no folder")
        asked = {"prompt": "a red circle", "steps": 1, "width": 64, "height": 64}
        answer = http.post("/sdapi/v1/txt2img", json=asked)
        how, why = outcome(http, workflow(seed=800 + len(way)))
        if way == "a file":
            assert answer.status_code == 422
            assert how == "error"
            assert why.strip()
        else:
            assert (answer.status_code, how) == (200, "success"), (answer.text, why)
    finally:
        folder.unlink() if folder.is_file() else shutil.rmtree(folder, ignore_errors=True)
        away.rename(folder)


def test_a_picture_that_was_deleted_before_its_turn(live_model: Live, http: httpx.Client) -> None:
    prompt = workflow(seed=3)
    picture = live_model.settings.inputs / "going.png"
    made = next(iter(live_model.settings.output_dir.glob("*.png")), None)
    if made is None:
        assert outcome(http, workflow(seed=4))[0] == "success"
        made = next(iter(live_model.settings.output_dir.rglob("*.png")))
    shutil.copy(made, picture)
    prompt["load"] = {"class_type": "LoadImage", "inputs": {"image": "going.png"}}
    prompt["9"]["inputs"]["images"] = ["load", 0]
    live_model.state.service.pause()
    try:
        id = http.post("/prompt", json={"prompt": prompt}).json()["prompt_id"]
        picture.unlink()
    finally:
        live_model.state.service.resume()
    record = wait(http, id)
    assert record["status"]["status_str"] == "error"
    assert "going.png" in json.dumps(record["status"]["messages"])


# Lines


class Lines:
    """Connections to a server, closed in the end."""

    def __init__(self, live: Live) -> None:
        self.port = live.port
        self.opened: list[socket.socket] = []

    def say(self, request: bytes, *, small: bool = False) -> socket.socket:
        """A connection on which something was said; `small`: that takes little before it is full."""
        line = socket.socket()
        self.opened.append(line)
        if small:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.settimeout(PATIENCE)
        line.connect(("127.0.0.1", self.port))
        line.sendall(request.replace(b"HOST", b"Host: 127.0.0.1:%d" % self.port))
        return line

    def upgrade(self, client: str, *, small: bool = False) -> socket.socket:
        """A websocket; what the server said first is still to be read."""
        key = base64.b64encode(os.urandom(16)).decode()
        line = self.say(
            f"GET /ws?clientId={client} HTTP/1.1\r\nHOST\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode(),
            small=small,
        )
        line.recv(1, socket.MSG_PEEK)  # nothing may be sent before the server has agreed
        return line


@pytest.fixture
def lines(live: Live) -> Iterator[Lines]:
    lines = Lines(live)
    yield lines
    for line in lines.opened:
        line.close()
    assert httpx.get(f"{live.url}/health").status_code == 200, "the server has survived"


def frame(kind: int, data: bytes, *, final: bool = True) -> bytes:
    """A masked websocket frame (RFC 6455); the mask is zeros."""
    size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xff" + struct.pack(">Q", len(data))
    return bytes([final << 7 | kind]) + size + b"\0\0\0\0" + data


def until_closed(line: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    found = b""
    try:
        while data := line.recv(1 << 20):
            found += data
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(1, b"x" * 2_000_000), 1009), (frame(1, b"\xff\xfe"), 1007), (frame(5, b""), 1002),
        (frame(9, b"x" * 200), 1002), (b"\xf1\x80\0\0\0\0", 1002), (b"\x81\x01a", 1002), (frame(0, b"x"), 1002),
        (b"\x81\xff" + b"\xff" * 8, 1009),
    ],
)  # fmt: skip
def test_frames_that_break_the_rules_end_their_connection(lines: Lines, sent: bytes, code: int) -> None:
    line = lines.upgrade("breaks-rules")
    line.sendall(sent)
    last = until_closed(line)
    assert struct.pack(">H", code) in last[-200:] or len(sent) > 10_000, "a close frame may be lost behind what we sent"


def test_ten_thousand_messages_are_borne(lines: Lines) -> None:
    line = lines.upgrade("talks")
    line.sendall(frame(1, b'{"type": "nonsense"}') * 10_000 + frame(2, b"\0" * 100_000))
    line.sendall(frame(1, b'{"type": "feature_flags", "data": {}}'))
    found = b""
    while b"supports_preview_metadata" not in found:
        data = line.recv(1 << 16)
        assert data, found
        found += data


def test_who_asks_without_end_and_never_reads_is_let_go(
    live: Live, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP, over a websocket with pings, and over one that asks for answers: none keeps its connection."""
    monkeypatch.setattr(readers, "PATIENCE", 0.3)
    asking = {
        "GET": (lines.say(b"", small=True), b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10),
        "ping": (lines.upgrade("pings", small=True), frame(9, b"x" * 125) * 200),
        "flags": (lines.upgrade("flags", small=True), frame(1, b'{"type": "feature_flags"}') * 200),
    }
    for name, (line, data) in asking.items():
        until(lambda line=line, data=data: is_closed(line, data), f"the server hangs up on {name}")  # type: ignore[misc]
    until(lambda: not connections(live.port), "nothing is kept")


def connections(port: int) -> int:
    """Connections of this process, as the server, that still stand."""
    lines = Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(each[1].endswith(f":{port:04X}") and each[3] == "01" for each in fields)


@pytest.mark.parametrize("path", ["/prompt", "/userdata/x", "/octavo/pictures", "/upload/image", "/sdapi/v1/txt2img"])
def test_who_leaves_in_the_middle_of_a_body_is_no_fault_of_ours(
    lines: Lines, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    kind = "multipart/form-data; boundary=B" if "upload" in path else "application/json"
    head = f"POST {path} HTTP/1.1\r\nHOST\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n--B\r\n"
    with caplog.at_level("INFO", "octavo"):
        lines.say(head.encode()).close()
        until(lambda: f"POST {path} " in caplog.text, "the server has noticed")
    assert "fault of ours" not in caplog.text


def is_closed(line: socket.socket, data: bytes) -> bool:
    """Whether the other side has hung up; asks by sending more, and reads nothing."""
    try:
        line.settimeout(0.05)
        line.sendall(data)
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


# Files of an earlier time


@pytest.mark.parametrize("what", ["damaged", "foreign", "newer"])
def test_a_queue_file_that_cannot_be_used_is_left_alone_and_told(tmp_path: Path, what: str) -> None:
    import sqlite3
    from contextlib import closing

    file = tmp_path / "data" / "queue.sqlite3"
    file.parent.mkdir()
    if what == "damaged":
        file.write_bytes(b"SQLite format 3\0" + os.urandom(20_000))
    else:
        with closing(sqlite3.connect(file)) as db:
            db.execute("CREATE TABLE notes (text TEXT)")
            if what == "newer":
                db.execute(f"PRAGMA application_id = {0x4F637476}")
                db.execute("PRAGMA user_version = 99")
            db.commit()
    before = file.read_bytes()
    process = start(tmp_path)
    assert process.popen.wait(PATIENCE * 4) not in (0, None)
    assert file.read_bytes() == before
    said = process.said()
    assert "Traceback" not in said
    assert {"damaged": "damaged", "foreign": "another program", "newer": "newer Octavo"}[what] in " ".join(said.split())
