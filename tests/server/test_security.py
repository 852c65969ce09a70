"""Nobody gets in who should not, and names lead nowhere but into their folder."""

import base64
import contextlib
import json
import logging
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from octavo.checkpoint.folders import EMBEDDED
from octavo.engine.events import Task
from octavo.errors import CorruptFileError, RequestError
from octavo.server.keys import Keys, add_key, read_keys, remove_key
from octavo.server.links import LIFETIME, Links
from octavo.server.places import Places
from octavo.server.security import jail
from octavo.server.state import State, Works
from tests.goldens import golden
from tests.server.conftest import Live, MakeServer, fake_load, listening, settings_in, until

KEY = "a-key-of-enough-letters"


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files inside and outside, and links to both."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "in.png").write_text("in")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "outside").mkdir()
    (root / "link_out").symlink_to(tmp_path / "secret")
    (root / "folder_out").symlink_to(tmp_path / "outside")
    (root / "link_in").symlink_to(root / "in.png")
    (root / "loop").symlink_to(root / "loop")
    return root


BAD = (
    "..", ".", "", "/", "/etc/passwd", "../secret", "sub/../../secret", "sub/..", "sub//x", "a\\b", "..\\secret",
    "C:/x", "a\0b", "a\nb", "link_out", "folder_out/x", "folder_out", "loop", "x" * 5000, "./in.png",
    "\u202egnp", "~root/x\\", " /../secret",
)  # fmt: skip


def test_names_that_lead_out_are_refused(folder: Path) -> None:
    for name in BAD:
        with pytest.raises(RequestError):
            jail(folder, name)


def test_names_inside_are_found(folder: Path) -> None:
    assert jail(folder, "in.png").read_text() == "in"
    assert jail(folder, "link_in").read_text() == "in"
    assert jail(folder, "sub/new name (1).png") == folder / "sub" / "new name (1).png"
    assert jail(folder, "~x").parent == folder


@given(st.text(alphabet="./\\ab~:\0 %", max_size=12))
def test_no_name_leads_out(name: str) -> None:
    root = Path("/tmp/octavo-no-such-folder/root")
    with contextlib.suppress(RequestError):
        assert jail(root, name).is_relative_to(root)


def test_every_recorded_traversal_is_refused(folder: Path) -> None:
    """The names by which ComfyUI was tried."""
    from urllib.parse import parse_qs, urlsplit

    tried = 0
    for exchange in json.loads(golden("comfyui/api/files.json").read_text())["exchanges"]:
        query = parse_qs(urlsplit(exchange["request"]["path"]).query)
        if exchange["name"].startswith(("view traversal", "view absolute", "view backslash")):
            name = "/".join([*query.get("subfolder", []), *query["filename"]])
            with pytest.raises(RequestError):
                jail(folder, name)
            tried += 1
    assert tried >= 6


# Foreign pages


def test_only_our_own_names_are_answered_to(make_server: MakeServer) -> None:
    """A page whose name was bent to our address sends that name as Host."""
    server = make_server(allowed_hosts=("pictures.example",))
    for host in (
        "127.0.0.1:8188",
        "localhost",
        "LOCALHOST:1",
        "[::1]:8188",
        "a.localhost",
        "pictures.example:80",
        "10.0.0.7",
    ):
        assert server.get("/queue", headers={"Host": host}).status_code == 200, host
    for host in (
        "evil.example",
        "evil.example:8188",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "pictures.example.",
        "127.0.0.1:evil/",
        "localhost:80:80",
        "[::1",
    ):
        answer = server.get("/queue", headers={"Host": host})
        assert answer.status_code == 403, host
        assert "--allowed-host" in answer.text


def test_origins_as_recorded_from_comfyui(server: TestClient) -> None:
    for exchange in json.loads(golden("comfyui/api/files.json").read_text())["exchanges"]:
        if exchange["name"].startswith("origin"):
            asked = exchange["request"]
            answer = server.get(asked["path"], headers={"Host": "127.0.0.1:8199", **asked["headers"]})
            assert answer.status_code == exchange["response"]["status"], exchange["name"]


def test_pages_of_other_origins_are_refused(server: TestClient) -> None:
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1:9999",
        "http://127.0.0.1",
        "https://127.0.0.1.evil.example:8188",
        "file://",
        "",
    ):
        for method in ("GET", "POST", "OPTIONS"):
            answer = server.request(method, "/sdapi/v1/options", headers={"Origin": origin}, content="{}")
            assert answer.status_code == 403, (method, origin)


def test_websockets_of_foreign_pages_are_refused(live: Live) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        assert opens(live, "/ws", headers) == 403, headers
    assert opens(live, "/ws", {"Origin": live.url}) == 101


def test_parts_of_foreign_pages_are_refused_and_links_are_not(server: TestClient) -> None:
    def asked(site: str, mode: str) -> int:
        return server.get("/health", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}).status_code

    assert asked("cross-site", "no-cors") == asked("same-site", "no-cors") == 403
    assert asked("cross-site", "navigate") == asked("same-origin", "cors") == asked("none", "navigate") == 200
    posted = server.post("/sdapi/v1/interrupt", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"})
    assert posted.status_code == 403


def test_cors_only_where_it_was_asked_for(make_server: MakeServer) -> None:
    origin = {"Origin": "https://pictures.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    closed = make_server()
    assert "access-control-allow-origin" not in closed.options("/prompt", headers=preflight).headers
    opened = make_server(cors=("https://pictures.example",), api_keys=(KEY,))
    allowed = opened.options("/sdapi/v1/txt2img", headers=preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://pictures.example"
    answer = opened.get("/sdapi/v1/options", headers={**origin, "X-API-Key": KEY})
    assert answer.headers["access-control-allow-origin"] == "https://pictures.example"
    assert opened.get("/health", headers={"Origin": "https://other.example"}).status_code == 403


def test_answers_tell_browsers_to_be_careful(server: TestClient) -> None:
    for path in ("/health", "/docs", "/no/such/page"):
        headers = server.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "frame-ancestors 'self'" in headers["content-security-policy"]
        assert "server" not in headers


# Keys


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


@pytest.fixture
def locked(make_server: MakeServer) -> TestClient:
    return make_server(api_keys=(KEY,))


def test_a_key_opens_however_it_is_shown(locked: TestClient) -> None:
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}, basic("anyone", KEY), basic("", KEY)):
        assert locked.get("/queue", headers=headers).status_code == 200


def test_without_the_key_everything_but_health_is_shut(locked: TestClient) -> None:
    schema = locked.get("/openapi.json", headers={"X-API-Key": KEY}).json()
    routes = [(method, path) for path, methods in schema["paths"].items() for method in methods]
    assert len(routes) > 50
    for method, path in [*routes, ("get", "/docs"), ("get", "/openapi.json"), ("get", "/"), ("get", "/comfy/")]:
        status = locked.request(method, path).status_code
        assert status == (200 if path == "/health" else status) or path == "/ready"
        if path not in ("/health", "/ready"):
            assert status == 401, (method, path)


def test_wrong_keys_open_nothing(locked: TestClient) -> None:
    wrong = (KEY + "x", KEY[:-1], KEY.upper(), "", "\xe4", KEY + "\0")
    for key in wrong:
        shown = [("authorization", b"Bearer " + key.encode("latin-1")), ("x-api-key", key.encode("latin-1"))]
        for name, value in shown:
            assert locked.get("/queue", headers={name: value}).status_code == 401, (name, key)
        assert locked.get("/queue", headers=basic(KEY, key)).status_code == 401
    for nonsense in ("Basic", "Basic !!!", "Bearer", "Digest x", "Basic " + base64.b64encode(b"\xff\xfe").decode()):
        assert locked.get("/queue", headers={"Authorization": nonsense}).status_code == 401
    assert locked.get(f"/queue?token={KEY}").status_code == 401


def test_websockets_are_locked_too(tmp_path: Path) -> None:
    with listening(settings_in(tmp_path, api_keys=(KEY,))) as live:
        for path in ("/ws", "/ws?token=wrong", "/api/ws"):
            assert opens(live, path, {}) == 401, path
        for path, headers in ((f"/ws?token={KEY}", {}), ("/ws", basic("x", KEY)), ("/ws", {"X-API-Key": KEY})):
            assert opens(live, path, headers) == 101, path


def opens(live: Live, path: str, headers: Mapping[str, str]) -> int:
    """The status with which a websocket is answered."""
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    with socket.create_connection(("127.0.0.1", live.port)) as line:
        host = headers.get("Host", f"127.0.0.1:{live.port}")
        rest = {name: value for name, value in headers.items() if name != "Host"}
        try:
            with connect(f"ws://{host}{path}", sock=line, additional_headers=rest, open_timeout=10) as opened:
                assert json.loads(opened.recv(timeout=10))["type"] == "status"
                return 101
        except InvalidStatus as refusal:
            return refusal.response.status_code


def test_keys_are_kept_as_hashes_and_read_again_when_they_change(make_server: MakeServer) -> None:
    server = make_server()
    file = server.app.state.octavo.settings.keys_file  # type: ignore[attr-defined]
    assert server.get("/queue").status_code == 200
    key = add_key(file, "alice", priority=3)
    assert key not in file.read_text()
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert server.get("/queue").status_code == 401
    headers = {"Authorization": f"Bearer {key}"}
    assert server.get("/queue", headers=headers).status_code == 200
    server.post("/sdapi/v1/txt2img", json={"prompt": "a"}, headers=headers)
    (job,) = server.app.state.octavo.queue.history("generate")  # type: ignore[attr-defined]
    assert (job.client, job.priority) == ("alice", 3)
    add_key(file, "bob")
    remove_key(file, "alice")
    assert server.get("/queue", headers=headers).status_code == 401
    assert [entry.name for entry in read_keys(file)] == ["bob"]


def test_keys_that_cannot_be_read_let_nobody_in(make_server: MakeServer) -> None:
    server = make_server()
    file = server.app.state.octavo.settings.keys_file  # type: ignore[attr-defined]
    for text in ("{", "[1]", '[{"name": 1}]', '{"a": "b"}'):
        file.write_text(text)
        assert server.get("/queue").status_code == 503
    with pytest.raises(RequestError, match="cannot be read"):
        Keys(file)


def test_names_of_keys_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    assert add_key(file, "a") != add_key(file, "b")
    for name in ("a", " ", "x\n"):
        with pytest.raises(RequestError):
            add_key(file, name)
    with pytest.raises(RequestError, match="no key 'c'"):
        remove_key(file, "c")


def test_who_shows_a_wrong_key_is_refused_even_where_none_is_needed(make_server: MakeServer) -> None:
    server = make_server(api_keys=(KEY,), allow_anonymous=True)
    assert server.get("/queue").status_code == 200
    assert server.get("/queue", headers={"X-API-Key": "wrong"}).status_code == 401


def test_addresses_expire_and_cannot_be_changed() -> None:
    links = Links()
    path = links.path("a b/ü.png", now=1000.0)
    from urllib.parse import unquote

    decoded = unquote(path)
    assert links.name(decoded, now=1001.0) == "a b/ü.png"
    assert links.name(decoded, now=1000.0 + LIFETIME + 1) is None
    assert Links().name(decoded, now=1001.0) is None
    later = decoded.replace("4600-", "9600-")
    assert later != decoded
    for other in (later, decoded + "x", decoded.replace("ü", "u"), "/v1/images/files/", "/v1/images/files/٣-x/y", "x"):
        assert links.name(other, now=1001.0) is None


# Logs


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    found: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    handler = Keep(logging.DEBUG)
    logger = logging.getLogger("octavo")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_no_key_is_in_the_log(locked: TestClient, lines: list[logging.LogRecord]) -> None:
    from octavo.server.logs import Blotted, Json

    locked.get(f"/queue?token={KEY}", headers={"X-API-Key": KEY})
    locked.get("/queue", headers={"Authorization": "Bearer wrong-key-of-somebody"})
    locked.post("/sdapi/v1/txt2img", json={"prompt": "fail"}, headers=basic("anyone", KEY))
    made = "octavo-" + "A" * 43
    logging.getLogger("octavo.test").warning("it said Authorization: Bearer %s and token=%s", made, KEY)
    for record in lines:
        Blotted().filter(record)
    text = "\n".join(Json().format(record) for record in lines)
    assert "/queue" in text
    for secret in (KEY, made, "wrong-key-of-somebody", basic("anyone", KEY)["Authorization"][6:]):
        assert secret not in text


# Where files lie


def test_clients_are_told_names_and_not_where_files_lie(make_server: MakeServer, tmp_path: Path) -> None:
    """A damaged model, asked for through each API, before and after it is accepted."""
    models = tmp_path / "secret-place" / "models"
    (models / "checkpoints").mkdir(parents=True)
    (models / "checkpoints" / "broken.safetensors").write_bytes(b"no header")

    def fail(_task: Task) -> Mapping[str, object]:
        raise CorruptFileError(
            f"'{models / 'checkpoints' / 'late.safetensors'}' is cut off, '{models}' and '{EMBEDDED}'."
        )

    def load(state: State) -> Works:
        return replace(fake_load(state), runners={"generate": fail, "graph": fail})

    server = make_server(load=load, models_dir=models)
    answers = [
        server.post("/octavo/jobs", json={"prompt": "a star", "model": "broken"}),
        server.post("/v1/images/generations", json={"prompt": "a star", "model": "broken"}),
        server.post("/sdapi/v1/txt2img", json={"prompt": "a", "override_settings": {"sd_model_checkpoint": "broken"}}),
        server.post("/v1/images/generations", json={"prompt": "a star"}),
        server.post("/sdapi/v1/txt2img", json={"prompt": "a star"}),
    ]
    id = server.post("/octavo/jobs", json={"prompt": "a star"}).json()["id"]
    until(lambda: server.get(f"/octavo/jobs/{id}").json()["over"], "the job ends")
    answers.append(server.get(f"/octavo/jobs/{id}"))
    for answer in answers:
        assert "secret-place" not in answer.text
        assert str(EMBEDDED) not in answer.text
    assert [answer.status_code for answer in answers[3:]] == [422, 422, 200]
    for answer in answers[3:]:
        assert "'models/checkpoints/late.safetensors' is cut off, 'models' and 'models'." in answer.text


def test_paths_are_cut_by_the_longest_folder_that_is_known(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, models_dir=tmp_path / "m", model=str(tmp_path / "else" / "mine.safetensors"))
    places = Places(settings)
    paths = {
        tmp_path / "m" / "loras" / "a.safetensors": "models/loras/a.safetensors",
        settings.uploads / "b.png": "b.png",
        settings.inputs / "c.png": "input/c.png",
        settings.output_dir / "d.png": "output/d.png",
        settings.data_dir / "keys.json": "data/keys.json",
        tmp_path / "else" / "mine.safetensors": "mine.safetensors",
    }
    for path, called in paths.items():
        assert places.hidden(f"'{path}': no") == f"'{called}': no"
    nested = places.within({"a": [f"{path}" for path in paths], "b": 3})
    assert nested == {"a": list(paths.values()), "b": 3}
