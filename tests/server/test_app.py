"""The frame: a server answers at once, keeps its bounds, says how it is, and stops in good order."""

import contextlib
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from octavo.checkpoint.presets import Preset
from octavo.errors import CorruptFileError, QueueBusyError, RequestError
from octavo.server import logs, pictures, run
from octavo.server.run import Server, address_of, bind
from octavo.server.state import State, Works
from tests.server.conftest import Live, MakeServer, fake_load, listening, settings_in, until


def test_it_is_alive_before_it_is_ready(make_server: MakeServer) -> None:
    """Requests that need what is not there yet wait for it; the others are answered."""
    go = threading.Event()

    def slowly(state: State) -> Works:
        go.wait(20)
        return fake_load(state)

    server = make_server(load=slowly)
    assert server.get("/health").json()["status"] == "ok"
    early = server.get("/ready")
    assert (early.status_code, early.json()["ready"]) == (503, False)
    assert "octavo_queue_depth" in server.get("/metrics").text
    threading.Timer(0.2, go.set).start()
    assert server.get("/sdapi/v1/samplers").status_code == 200
    until(lambda: server.get("/ready").status_code == 200, "it is ready")


def test_what_cannot_be_loaded_ends_the_server_with_the_reason(tmp_path: Path) -> None:
    def broken(_state: State) -> Works:
        raise CorruptFileError("model.safetensors is cut short.")

    settings = settings_in(tmp_path)
    server = Server(settings, load=broken)
    with contextlib.closing(bind(settings)) as door, pytest.raises(CorruptFileError, match="cut short"):
        run.run(server, door)


def test_requests_that_wait_are_told_when_it_cannot_be_loaded(make_server: MakeServer) -> None:
    def broken(_state: State) -> Works:
        time.sleep(0.1)
        raise CorruptFileError("model.safetensors is cut short.")

    server = make_server(load=broken)
    answer = server.get("/v1/models")
    assert answer.status_code == 503
    assert "cut short" in answer.json()["error"]["message"]


def test_what_was_accepted_before_a_stop_is_done_after_the_next_start(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, workers=1)

    def never(_state: State) -> Works:
        time.sleep(0.3)
        raise CorruptFileError("not this time")

    with listening(settings, never) as live:
        request = pictures.request_of({"prompt": "a star", "seed": 1}, settings, Preset(name="any"))
        payload = pictures.payload_of(request, None)
        job = live.state.service.submit("generate", payload).id
    with listening(settings) as live:
        until(lambda: (live.state.queue.get(job) or pytest.fail("lost")).over, "it is done")
        stored = live.state.queue.get(job)
        assert stored is not None
        assert pictures.made(stored, settings.output_dir)[0].image().size == (64, 64)


# Bounds


def test_a_body_that_is_too_large_is_refused_whatever_it_announces(make_server: MakeServer) -> None:
    server = make_server(max_body=2000)
    body = json.dumps({"prompt": "a", "negative_prompt": "b" * 3000}).encode()

    def in_parts() -> Iterator[bytes]:
        for start in range(0, len(body), 500):
            yield body[start : start + 500]

    headers = {"Content-Type": "application/json"}
    for content in (body, in_parts()):
        answer = server.post("/sdapi/v1/txt2img", content=content, headers=headers)
        assert answer.status_code == 413
        assert "2000 bytes" in answer.json()["detail"]
    assert server.post("/sdapi/v1/txt2img", json={"prompt": "a"}).status_code == 200
    for length in ("-1", "1e3", "٣"):
        raw = {**headers, "Content-Length": length.encode("utf-8")}
        assert server.post("/sdapi/v1/txt2img", content=b"{}", headers=raw).status_code in (400, 413)


def talk(live: Live, *parts: bytes, pause: float = 0.0) -> bytes:
    """What the server says to these bytes until it hangs up."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as line:
        for part in parts:
            with contextlib.suppress(OSError):
                line.sendall(part)
            time.sleep(pause)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while more := line.recv(65536):
                said += more
        return said


def test_a_sender_that_falls_silent_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEADER_TIMEOUT", 0.3)
    with listening(settings_in(tmp_path, body_timeout=0.3)) as live:
        host = f"Host: 127.0.0.1:{live.port}\r\n".encode()
        head = b"POST /sdapi/v1/txt2img HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n" + host
        assert b" 408 " in talk(live, head + b"\r\n", b'{"prompt": ')
        # No header, half a header, and a header that never ends.
        for parts in ([], [b"GET /hea"], [b"GET /health HTTP/1.1\r\n", *[b"X: y\r\n"] * 5]):
            start = time.monotonic()
            assert talk(live, *parts, pause=0.1 if parts else 0) == b""
            assert time.monotonic() - start < 5
        assert b" 200 " in talk(live, b"GET /health HTTP/1.1\r\nConnection: close\r\n" + host + b"\r\n")


def test_a_long_answer_is_not_cut_by_the_timeouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    monkeypatch.setattr(run, "HEADER_TIMEOUT", 0.2)
    with listening(settings_in(tmp_path, body_timeout=0.2)) as live, httpx.Client(base_url=live.url) as client:
        for _ in range(2):  # on one connection
            answer = client.post("/sdapi/v1/txt2img", json={"prompt": "slow 30"}, timeout=20)
            assert answer.status_code == 200
            time.sleep(0.3)


def test_a_header_without_end_is_refused(live: Live) -> None:
    said = talk(live, b"GET /health HTTP/1.1\r\nX: " + b"y" * 200_000)
    assert said == b"" or b" 400 " in said.splitlines()[0]


# What is told


def test_a_fault_of_ours_is_a_500_that_tells_nothing(server: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    state = server.app.state.octavo  # type: ignore[attr-defined]

    def broken() -> bytes:
        raise ZeroDivisionError("the secret inside")

    state.metrics.render = broken
    with caplog.at_level(logging.ERROR):
        answer = server.get("/metrics", headers={"X-Request-ID": "find-me"})
    assert answer.status_code == 500
    assert answer.headers["X-Request-ID"] == "find-me"
    assert "find-me" in answer.text
    assert "secret" not in answer.text
    assert "the secret inside" in caplog.text
    drawn = server.post("/sdapi/v1/txt2img", json={"prompt": "fail"})
    assert drawn.status_code == 500
    assert "secret" not in drawn.text


def test_every_answer_has_the_id_of_its_request(server: TestClient) -> None:
    assert server.get("/health", headers={"X-Request-ID": "abc-1"}).headers["X-Request-ID"] == "abc-1"
    ids = {
        server.get("/health", headers=headers).headers["X-Request-ID"] for headers in ({}, {"X-Request-ID": "a b\x01"})
    }
    assert len(ids) == 2
    assert not ids & {"a b\x01"}
    assert server.get("/no/such/page").headers["X-Request-ID"]


def test_errors_have_the_shape_of_their_api(server: TestClient) -> None:
    assert set(server.get("/v1/nothing").json()["error"]) == {"message", "type", "param", "code"}
    assert {"error", "detail", "errors"} <= set(server.get("/sdapi/v1/nothing").json())
    assert server.post("/v1/images/generations", content=b"{").status_code == 400
    assert server.post("/sdapi/v1/txt2img", content=b"{").status_code == 422
    assert server.delete("/v1/models").status_code == 405


def test_all_routes_are_described_on_one_page(server: TestClient) -> None:
    page = server.get("/docs").text
    for word in ("/sdapi/v1/txt2img", "/v1/images/generations", "/prompt", "negative_prompt", "/health"):
        assert word in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://127.0.0.1", "")


def test_metrics_count_requests(server: TestClient) -> None:
    server.post("/sdapi/v1/txt2img", json={"prompt": "a"})
    text = server.get("/metrics").text
    assert 'octavo_requests_total{api="a1111",state="accepted"} 1.0' in text
    assert 'octavo_requests_total{api="a1111",state="done"} 1.0' in text


@pytest.fixture
def restored() -> Iterator[None]:
    """Loggers as they were before."""
    names = ("octavo", "uvicorn", "py.warnings", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
    found = {name: logging.getLogger(name) for name in names}
    before = {name: (each.handlers, each.propagate, each.level, each.disabled) for name, each in found.items()}
    yield
    for name, each in found.items():
        each.handlers, each.propagate, level, each.disabled = before[name]
        each.setLevel(level)


@pytest.mark.usefixtures("restored")
def test_the_log_is_one_line_a_request(make_server: MakeServer) -> None:
    stream = io.StringIO()
    logs.set_up(stream, form="json", level="info")
    server = make_server()
    server.get("/queue?secret=1", headers={"X-Request-ID": "one"})
    server.get("/health")
    server.get("/no%0Asuch%1B[31mline")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    requests = [line for line in lines if line["logger"] == "octavo.server.access"]
    assert [(line["method"], line["path"], line["status"]) for line in requests] == [
        ("GET", "/queue", 200),
        ("GET", "/no\\nsuch\\x1b[31mline", 404),
    ]
    assert (requests[0]["request_id"], requests[0]["client"], requests[0]["level"]) == ("one", "anonymous", "info")
    assert requests[0]["ms"] >= 0
    stream.truncate(0)
    logs.set_up(stream, form="plain", level="info")
    server.get("/queue")
    assert "GET /queue 200" in stream.getvalue()


# The door


def test_a_port_that_is_taken_is_said_so(live: Live, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"another program may have it.*Choose another --port"):
        bind(settings_in(tmp_path, port=live.port))
    with pytest.raises(RequestError, match="no such address"):
        bind(settings_in(tmp_path, host="no.such.host.invalid"))


def test_a_folder_that_another_server_has_is_left_alone(live: Live, tmp_path: Path) -> None:
    preview = live.settings.temp_dir / "preview.png"
    preview.write_text("still wanted")
    with pytest.raises(QueueBusyError, match="in use"):
        State(live.settings, load=fake_load)
    assert preview.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be made"):
        State(settings_in(tmp_path / "other", output_dir=tmp_path / "file" / "output"), load=fake_load)


def test_addresses_are_those_to_type(tmp_path: Path) -> None:
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("0.0.0.0", socket.gethostname())):
        settings = settings_in(tmp_path, host=host)
        with contextlib.closing(bind(settings)) as door:
            assert address_of(door, settings) == f"http://{shown}:{door.getsockname()[1]}"


def test_uploads_are_forgotten_once_nobody_needs_them(tmp_path: Path) -> None:
    from PIL import Image

    kept, gone = (pictures.keep_upload(Image.new("L", (4, 4), colour), tmp_path) for colour in (1, 2))
    assert pictures.keep_upload(Image.new("L", (4, 4), 1), tmp_path) == kept
    jobs = [{"request": {"image": kept, "seed": 1}}]
    assert pictures.forget_uploads(tmp_path, jobs) == 0
    assert pictures.forget_uploads(tmp_path, jobs, older_than=-1) == 1
    assert (Path(kept).exists(), Path(gone).exists()) == (True, False)


def test_a_stop_keeps_what_clients_wait_for(tmp_path: Path) -> None:
    """They are told to come back, and do, with the same key, for the same picture."""
    import httpx

    settings, body, headers = settings_in(tmp_path), {"prompt": "slow 100", "seed": 9}, {"Idempotency-Key": "mine"}
    answers: list[httpx.Response] = []
    with listening(settings) as live:

        def ask() -> None:
            answers.append(httpx.post(f"{live.url}/sdapi/v1/txt2img", json=body, headers=headers, timeout=30))

        thread = threading.Thread(target=ask)
        thread.start()
        without_key = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{live.url}/v1/images/generations", json=body, timeout=30))
        )
        without_key.start()
        until(lambda: len(live.state.queue.running()) == 2, "it draws")
    for each in (thread, without_key):
        each.join(20)
    assert [answer.status_code for answer in answers] == [503, 503]
    assert all("Retry-After" in answer.headers for answer in answers)
    with listening(settings) as live:
        again = httpx.post(f"{live.url}/sdapi/v1/txt2img", json=body, headers=headers, timeout=30)
        assert again.status_code == 200
        assert json.loads(again.json()["info"])["all_seeds"] == [9]
        until(lambda: len(live.state.queue.history("generate")) == 2, "both are done")
        assert {job.state for job in live.state.queue.history("generate")} == {"done"}
