"""What the page keeps: whole or not at all, in its own folder."""

import json
import os
from pathlib import Path
from threading import Thread

import pytest
from starlette.testclient import TestClient

from octavo.server.comfy.store import LARGEST_SETTINGS, SETTINGS, UserFiles
from octavo.server.problems import Refused
from tests.server.comfy.servers import state_of


@pytest.fixture
def folder(server: TestClient) -> Path:
    return state_of(server).settings.user_dir / "default"


def test_names_with_slashes_and_a_folder_called_move(server: TestClient, folder: Path) -> None:
    """`/userdata/x%2Fmove%2Fy` is a file; `/userdata/x/move/y` is a request to move one."""
    assert server.post("/userdata/workflows%2Fmove%2Fa.json", content="1").json() == "workflows/move/a.json"
    assert (folder / "workflows" / "move" / "a.json").read_text() == "1"
    moved = server.post("/comfy/api/userdata/workflows%2Fmove%2Fa.json/move/b%20%C3%BC.json")
    assert moved.json() == "b ü.json"
    assert (folder / "b ü.json").read_text() == "1"
    assert server.get("/userdata/b%20%C3%BC.json").text == "1"


def test_no_name_leads_out(server: TestClient, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text("nobody may read this")
    folder.mkdir(parents=True)
    (folder / "link").symlink_to(outside)
    (folder / "a.json").write_text("mine")
    up = os.path.relpath(outside, folder.resolve()).replace("/", "%2F")
    names = [f"{up}%2Fsecret.json", "link%2Fsecret.json", str(outside).replace("/", "%2F") + "%2Fsecret.json", "..%5Cx"]
    for name in (*names, "..%2F..", "..%2Fx", "a%00b", "x%2F..%2F..%2Fy"):
        answers = [
            server.get(f"/userdata/{name}"),
            server.post(f"/userdata/{name}", content="bad"),
            server.delete(f"/userdata/{name}"),
            server.post(f"/userdata/a.json/move/{name}"),
            server.post(f"/userdata/{name}/move/b.json"),
        ]
        assert {answer.status_code for answer in answers} <= {403, 404, 405}, name
        assert not any("nobody" in answer.text for answer in answers)
    for query in (f"/userdata?dir={up}", f"/v2/userdata?path={up}", "/userdata?dir=link", "/v2/userdata?path=link"):
        assert server.get(query).status_code == 403, query
    assert server.get("/userdata?dir=.&recurse=true").status_code == 403
    assert [entry["name"] for entry in server.get("/v2/userdata").json()] == ["a.json"], "links out are not listed"
    assert (outside / "secret.json").read_text() == "nobody may read this"
    assert [path.name for path in outside.iterdir()] == ["secret.json"]


def test_what_the_disk_refuses_is_said(server: TestClient, folder: Path) -> None:
    server.post("/userdata/a.json", content="1")
    for name in ("a.json%2Fb.json", "x" * 300):
        answer = server.post(f"/userdata/{name}", content="2")
        assert 400 <= answer.status_code < 500
        assert answer.json()["error"]["message"]
    (folder / "dir").mkdir()
    assert server.post("/userdata/dir", content="1").status_code == 400
    assert server.get("/userdata/dir").status_code == 404
    assert server.delete("/userdata/dir").status_code == 404
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "dir"], "no parts are left"


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    """Two writers and a reader: every read is one of the two texts."""
    files = UserFiles(tmp_path)
    texts = {letter * 200_000 for letter in ("a", "b")}
    files.write("x.json", b"a" * 200_000, overwrite=True)

    def write(letter: str) -> None:
        for _ in range(30):
            files.write("x.json", letter.encode() * 200_000, overwrite=True)

    writers = [Thread(target=write, args=(letter,)) for letter in ("a", "b")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert (tmp_path / "x.json").read_text() in texts
    for writer in writers:
        writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_settings_of_many_writers_are_all_kept(tmp_path: Path) -> None:
    files = UserFiles(tmp_path)
    writers = [Thread(target=files.change_settings, args=({f"key {n}": n},)) for n in range(20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert files.settings() == {f"key {n}": n for n in range(20)}


def test_settings_have_bounds_and_damage_is_said(tmp_path: Path) -> None:
    files = UserFiles(tmp_path)
    with pytest.raises(Refused, match="MB of settings"):
        files.change_settings({"big": "x" * LARGEST_SETTINGS})
    assert files.settings() == {}
    for text in ("{", "[]", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")):
        (tmp_path / SETTINGS).write_text(text, "latin-1")
        with pytest.raises(Refused, match="Correct the file"):
            files.settings()


def test_any_json_is_a_setting(server: TestClient) -> None:
    for value in (None, True, 0.5, "text", [1], {"a": {"b": None}}):
        assert server.post("/settings/A.B%20c", content=json.dumps(value)).status_code == 200
        assert server.get("/settings/A.B%20c").json() == value
        assert server.get("/settings").json() == {"A.B c": value}
