"""Pictures in and out: nothing leads out of the folders, and what comes in is a picture or refused."""

import json
import os
from io import BytesIO
from itertools import product
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from starlette.testclient import TestClient

from octavo.server.comfy.files import clean_name, disposition
from octavo.server.settings import Settings
from tests.server.comfy.exchanges import png
from tests.server.comfy.servers import state_of
from tests.server.conftest import MakeServer

SECRET = b"nobody may read this"


@pytest.fixture
def settings(server: TestClient) -> Settings:
    return state_of(server).settings


def upload(server: TestClient, content: bytes, name: str = "a.png", **fields: str) -> httpx.Response:
    return server.post("/upload/image", files={"image": (name, content)}, data=fields)


# Out


@pytest.fixture
def secrets(settings: Settings, tmp_path: Path) -> list[str]:
    """Query strings that would show a file outside the folders, were they followed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(SECRET)
    (settings.inputs / "link.png").symlink_to(outside / "secret.png")
    (settings.inputs / "folder").symlink_to(outside)
    (settings.inputs / "loop").symlink_to(settings.inputs / "loop")
    up = os.path.relpath(outside, settings.inputs.resolve())
    return [
        f"filename={up}/secret.png",
        f"filename=secret.png&subfolder={up}",
        f"filename=secret.png&subfolder={outside}",
        f"filename={outside}/secret.png",
        f"filename=x/../{up}/secret.png",
        f"filename={up.replace('/', '%5C')}%5Csecret.png",
        f"filename={up.replace('/', '%252F')}%252Fsecret.png",
        "filename=link.png",
        "filename=secret.png&subfolder=folder",
        "filename=folder/secret.png",
        "filename=loop/secret.png",
        "filename=secret.png%00.png",
        f"filename={'a' * 5000}.png",
        "filename=.",
        "filename=/",
        "filename=%20",
    ]


def test_no_name_shows_a_file_outside(server: TestClient, secrets: list[str]) -> None:
    for query, more in product(secrets, ("", "&preview=webp", "&channel=rgb", "&channel=a")):
        answer = server.get(f"/view?{query}&type=input{more}")
        assert answer.status_code in (400, 403, 404), query
        assert SECRET not in answer.content, query


def test_a_part_of_a_file_is_sent(server: TestClient, settings: Settings) -> None:
    (settings.output_dir / "a.png").write_bytes(png())
    answer = server.get("/view?filename=a.png", headers={"Range": "bytes=2-5"})
    assert (answer.status_code, answer.content) == (206, png()[2:6])
    assert server.get("/view?filename=a.png", headers={"Range": "bytes=999-"}).status_code == 416


def test_nothing_is_sent_as_a_page_or_script(server: TestClient, settings: Settings) -> None:
    for name in ("a.html", "a.js", "a.svg", "a.xhtml", "a", "a.PNG.htm"):
        (settings.output_dir / name).write_bytes(b"<script>alert(1)</script>")
        answer = server.get(f"/view?filename={name}")
        assert answer.headers["content-type"] == "application/octet-stream", name
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_any_preview_is_a_small_picture(server: TestClient, settings: Settings) -> None:
    (settings.output_dir / "a.png").write_bytes(png(20, 10))
    for preview in ("webp", "webp;1", "webp;999", "jpeg;50", "jpeg", "gif;x", ";", "webp;-1", "", "jpeg;²"):
        answer = server.get("/view", params={"filename": "a.png", "preview": preview})
        expected = "jpeg" if preview.startswith("jpeg") else "webp"
        assert answer.headers["content-type"] == f"image/{expected}", preview
        image = Image.open(BytesIO(answer.content))
        assert (image.format, image.size) == (expected.upper(), (20, 10))


def test_channels(server: TestClient, settings: Settings) -> None:
    (settings.output_dir / "a.png").write_bytes(png(colour=(200, 30, 40, 128)))

    def pixel(channel: str) -> object:
        answer = server.get(f"/view?filename=a.png&channel={channel}")
        return Image.open(BytesIO(answer.content)).getpixel((0, 0))

    assert pixel("rgb") == (200, 30, 40)
    assert pixel("a") == (0, 0, 0, 128)
    assert pixel("rgba") == (200, 30, 40, 128)


# In


NOT_PICTURES = [
    b"", b"MZ", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe", b"GIF89a", png()[:40], b"RIFF0000WEBPVP8 ",
    b"\x89PNG\r\n\x1a\n" + bytes(100),
]  # fmt: skip


def test_only_pictures_are_kept(server: TestClient, settings: Settings) -> None:
    masks = {"original_ref": json.dumps({"filename": "a.png"})}
    for content, (path, more) in product(NOT_PICTURES, (("/upload/image", {}), ("/upload/mask", masks))):
        answer = server.post(path, files={"image": ("a.png", content)}, data=more)
        assert answer.status_code == 400, content[:20]
    assert list(settings.inputs.iterdir()) == []


def test_a_small_file_with_a_huge_picture_is_not_unpacked(make_server: MakeServer) -> None:
    server = make_server(max_upload_pixels=10_000)
    buffer = BytesIO()
    Image.new("1", (5000, 5000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 10_000
    answer = upload(server, buffer.getvalue())
    assert answer.status_code in (400, 413)
    assert "5000x5000" in answer.json()["error"]["message"]
    (state_of(server).settings.output_dir / "a.png").write_bytes(buffer.getvalue())
    assert server.get("/view?filename=a.png&preview=webp").status_code in (400, 413)
    assert server.get("/view?filename=a.png").status_code == 200, "as it is nothing is unpacked"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("a.png", "a.png"),
        ("../../a.png", "a.png"),
        ("..\\..\\a.png", "a.png"),
        ("/etc/a.png", "a.png"),
        (".htaccess", "htaccess.png"),
        ("a.html", "a.html.png"),
        ("..", "picture.png"),
        ("a\x00b.png", "ab.png"),
        ("ü 1.PNG", "ü 1.PNG"),
        ("a" * 300 + ".png", "a" * 150 + ".png"),
    ],
)
def test_names_are_cleaned(sent: str, kept: str) -> None:
    assert clean_name(sent, png()) == kept


@given(st.text(max_size=300))
def test_any_name_becomes_a_plain_one(sent: str) -> None:
    name = clean_name(sent, png())
    assert name.lower().endswith(".png")
    assert not name.startswith(".")
    assert name.isprintable()
    assert not set(name) & set("/\\:")
    assert clean_name(name, png()) == name
    disposition(name).encode("latin-1")


def test_the_same_name_for_other_pictures_is_counted_up(server: TestClient) -> None:
    names = [upload(server, png(colour=(n, 0, 0))).json()["name"] for n in (1, 2, 3, 2)]
    assert names == ["a.png", "a (1).png", "a (2).png", "a (1).png"]
    assert upload(server, png(colour=(9, 9, 9)), overwrite="true").json()["name"] == "a.png"
    kept = server.get("/view?filename=a.png&type=input").content
    assert Image.open(BytesIO(kept)).getpixel((0, 0)) == (9, 9, 9)


def test_no_subfolder_leads_out(server: TestClient, settings: Settings) -> None:
    for subfolder in ("..", "../x", "/etc", "a/../../b", "a\\b", "a\x00b", "a" * 3000):
        assert upload(server, png(), subfolder=subfolder).status_code == 400, subfolder[:20]
    assert list(settings.inputs.iterdir()) == []


def test_nothing_is_written_through_a_link(server: TestClient, settings: Settings, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (settings.inputs / "folder").symlink_to(outside)
    (settings.inputs / "a.png").symlink_to(outside / "b.png")
    assert upload(server, png(), subfolder="folder").status_code == 400
    assert upload(server, png(), overwrite="true").json()["name"] == "a.png"
    assert list(outside.iterdir()) == []
    assert not (settings.inputs / "a.png").is_symlink()


def test_a_mask_is_laid_over_its_picture(server: TestClient, settings: Settings) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", '{"nodes": []}')
    Image.new("RGB", (8, 4), (10, 20, 30)).save(settings.output_dir / "a.png", pnginfo=info)
    answer = server.post(
        "/upload/mask",
        files={"image": ("m.png", png(8, 4, colour=(0, 0, 0, 77)))},
        data={"original_ref": json.dumps({"filename": "a.png", "type": "output"}), "subfolder": "clipspace"},
    )
    assert answer.json() == {"name": "m.png", "subfolder": "clipspace", "type": "input"}
    made = Image.open(settings.inputs / "clipspace" / "m.png")
    assert made.getpixel((0, 0)) == (10, 20, 30, 77)
    assert made.info["workflow"] == '{"nodes": []}'


NO_REFS = [
    "", "{", "[]", '{"filename": 5}', '{"filename": "nosuch.png"}', '{"filename": "../a.png"}', "[" * 5000,
    '{"filename": "a.png", "type": 5}', '{"filename": "a.png", "type": "nonsense"}', '{"filename": "small.png"}',
]  # fmt: skip


def test_a_mask_without_its_picture_is_refused(server: TestClient, settings: Settings) -> None:
    (settings.output_dir / "small.png").write_bytes(png(2, 2))
    for ref in NO_REFS:
        answer = server.post("/upload/mask", files={"image": ("m.png", png())}, data={"original_ref": ref})
        assert answer.status_code in (400, 404), ref[:40]
        assert len(answer.json()["error"]["message"]) > 10
