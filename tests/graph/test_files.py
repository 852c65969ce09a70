"""Workflows come out of JSON and out of pictures, and anything else is refused with a reason."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from octavo.errors import OctavoError, RequestError
from octavo.graph.files import from_json, parse_json, read_workflow
from octavo.graph.workflow import InvalidPrompt
from tests.graph.compare import FixedLists
from tests.graph.test_workflow import JSON
from tests.graph.toys import IMAGE_PROMPT, TOYS

LISTS = FixedLists()
PAGE = {
    "nodes": [
        {"id": 1, "type": "EmptyImage", "inputs": [], "widgets_values": [64, 64, 1, 255]},
        {"id": 2, "type": "SaveToy", "inputs": [{"name": "images", "link": 3}], "widgets_values": ["img"]},
    ],
    "links": [[3, 1, 0, 2, 0, "IMAGE"]],
}


def _read(path: Any) -> Any:
    found = read_workflow(path, TOYS, LISTS)
    prompt = {id: {key: each[key] for key in ("class_type", "inputs")} for id, each in found.prompt.items()}
    return prompt, found.page


def _png(path: Any, **texts: str) -> Any:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("content", "page"),
    [
        (IMAGE_PROMPT, None),
        (PAGE, PAGE),
        ({"prompt": IMAGE_PROMPT, "client_id": "x"}, None),
        ({"prompt": IMAGE_PROMPT, "extra_data": {"extra_pnginfo": {"workflow": PAGE}}}, PAGE),
    ],
)
def test_json_of_every_kind_is_read(tmp_path, content, page):
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(content), "utf-8-sig")

    assert _read(path) == (IMAGE_PROMPT, page)


def test_a_node_called_prompt_is_a_node():
    prompt = {"prompt": IMAGE_PROMPT["1"], "2": {**IMAGE_PROMPT["2"], "inputs": {"images": ["prompt", 0]}}}

    assert from_json(prompt, TOYS, LISTS).prompt == prompt


@pytest.mark.parametrize(
    ("texts", "page"),
    [
        ({"prompt": IMAGE_PROMPT}, None),
        ({"workflow": PAGE}, PAGE),
        ({"prompt": IMAGE_PROMPT, "workflow": PAGE}, PAGE),
        ({"prompt": IMAGE_PROMPT, "workflow": {"odd": 1}}, None),
    ],
)
def test_a_png_carries_a_workflow(tmp_path, texts, page):
    path = _png(tmp_path / "a.png", **{key: json.dumps(text) for key, text in texts.items()})

    assert _read(path) == (IMAGE_PROMPT, page)


def test_texts_after_the_pixels_are_found(tmp_path):
    """Programs that add texts later put them behind."""
    import struct
    import zlib

    path = _png(tmp_path / "a.png")
    body = b"tEXt" + b"prompt\0" + json.dumps(IMAGE_PROMPT).encode("latin-1")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    whole = path.read_bytes()
    path.write_bytes(whole[:-12] + chunk + whole[-12:])

    assert _read(path)[0] == IMAGE_PROMPT


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_exif_carries_a_workflow_as_comfyui_writes_it(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(IMAGE_PROMPT)
    exif[0x010F] = "workflow:" + json.dumps(PAGE)
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (8, 8)).save(path, exif=exif)

    assert _read(path) == (IMAGE_PROMPT, PAGE)


def test_a_picture_drawn_without_a_workflow_says_how_to_draw_it_again(tmp_path):
    with pytest.raises(RequestError, match="octavo generate --from"):
        _read(_png(tmp_path / "a.png", octavo="{}", parameters="a fox"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.json", None, "There is no file"),
        ("none.png", None, "There is no file"),
        ("text.png", b"no picture", "cannot be read as a picture"),
        ("half.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "cannot be read as a picture"),
        ("odd.json", b"{nope", "no JSON.*line 1, column 2: nope"),
        ("cut.json", b'{"1": ', "line 1, column 7: the end"),
        ("bytes.json", b"\xff\xfe\x00", "byte 0 is not UTF-8"),
        ("digits.json", b"[" + b"9" * 5000 + b"]", "no JSON"),
        ("deep.json", b"[" * 100_000, "no JSON"),
        ("nested.json", b"[" * 200 + b"]" * 200, "nested too deeply"),
        ("broken.json", b'{"nodes": [5]}', "web page could have saved"),
    ],
)
def test_other_files_are_refused_with_a_reason(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(RequestError, match=reason):
        read_workflow(path, TOYS, LISTS)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(RequestError, match="cannot be read"):
        read_workflow(tmp_path, TOYS, LISTS)


def test_pictures_without_a_workflow_are_refused(tmp_path):
    with pytest.raises(RequestError, match="carries no workflow"):
        _read(_png(tmp_path / "a.png"))
    with pytest.raises(RequestError, match="AUTOMATIC1111"):
        _read(_png(tmp_path / "b.png", parameters="a fox\nSteps: 4"))


@pytest.mark.parametrize("end", ["", ",", "\n"])
def test_nodes_in_a_row_are_a_list(end):
    nodes = [{"class_type": "A", "inputs": {}}, {"class_type": "B", "inputs": {}}]

    assert parse_json(", ".join(json.dumps(node) for node in nodes) + end) == nodes


def test_numbers_in_a_row_are_no_list_of_nodes():
    with pytest.raises(InvalidPrompt):
        parse_json("1, 2")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.dictionaries(st.sampled_from(["prompt", "workflow", "octavo"]), JSON.map(json.dumps) | st.text(max_size=9))
)
def test_no_metadata_of_a_png_is_more_than_a_refusal(tmp_path, texts):
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)

    with suppress(OctavoError):
        found = read_workflow(tmp_path / "a.png", TOYS, LISTS)
        assert texts.keys() & {"prompt", "workflow"}
        assert found.page is None or "nodes" in found.page


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4), cut=st.integers(0, 400))
def test_no_damage_of_a_png_is_more_than_a_refusal(tmp_path, places, cut):
    _png(tmp_path / "a.png", prompt=json.dumps(IMAGE_PROMPT))
    content = bytearray((tmp_path / "a.png").read_bytes())
    for place, byte in places:
        content[place % len(content)] = byte
    (tmp_path / "a.png").write_bytes(content[: len(content) - cut % len(content)])

    with suppress(OctavoError):
        read_workflow(tmp_path / "a.png", TOYS, LISTS)
