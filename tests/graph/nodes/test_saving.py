"""What files are called, where they go, and what is inside."""

import json
import os
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from octavo.errors import NumericsError, RequestError
from octavo.graph.context import Context
from octavo.graph.nodes import inout
from octavo.graph.nodes.saving import filled
from octavo.graph.spec import NodeResult
from tests.graph.nodes.bare import bare, gradient


def save(context: Context, prefix: str = "img", images: Tensor | None = None) -> list[dict[str, str]]:
    result = inout.save_image.run(context, images=gradient(4, 6) if images is None else images, filename_prefix=prefix)
    assert isinstance(result, NodeResult)
    assert result.outputs == ()
    return list(result.ui["images"])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


# Names


def test_names_are_comfyuis_and_numbers_go_on(tmp_path: Path) -> None:
    context = bare(tmp_path)
    assert save(context, images=gradient(4, 6, 2)) == [
        {"filename": "img_00001_.png", "subfolder": "", "type": "output"},
        {"filename": "img_00002_.png", "subfolder": "", "type": "output"},
    ]
    assert save(context)[0]["filename"] == "img_00003_.png"
    assert save(context, "other")[0]["filename"] == "other_00001_.png"
    assert names(tmp_path / "output") == ["img_00001_.png", "img_00002_.png", "img_00003_.png", "other_00001_.png"]


@pytest.mark.parametrize(
    ("there", "following"),
    [
        ("img_00041_.png", "img_00042_.png"),
        ("img_00041_edited.jpg", "img_00042_.png"),
        ("img_123456_.png", "img_123457_.png"),
        ("img_00041.png", "img_00001_.png"),  # without the closing _ it is no name of ComfyUI's
        ("img_x_00041_.png", "img_00001_.png"),
        ("myimg_00041_.png", "img_00001_.png"),
        ("img_41a_.png", "img_00001_.png"),
    ],
)
def test_numbers_are_read_from_the_files_that_are_there(tmp_path: Path, there: str, following: str) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / there).touch()
    assert save(bare(tmp_path))[0]["filename"] == following


def test_nothing_that_is_there_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "img_00001_.png").write_text("mine")
    (tmp_path / "output" / "img_00002_.png").symlink_to(tmp_path / "gone")  # a link into nothing takes its name, too
    save(bare(tmp_path))
    assert (tmp_path / "output" / "img_00001_.png").read_text() == "mine"
    assert read(tmp_path / "output" / "img_00003_.png").size == (6, 4)


@pytest.mark.parametrize(
    ("prefix", "subfolder", "name"),
    [
        ("a/b/img", "a/b", "img"),
        ("a\\b\\img", "a/b", "img"),
        ("./img", "", "img"),
        ("a/../img/", "", "img"),
        ("a//b", "a", "b"),
        ("bücher/größe 日本", "bücher", "größe 日本"),
    ],
)
def test_a_prefix_may_name_folders(tmp_path: Path, prefix: str, subfolder: str, name: str) -> None:
    (saved,) = save(bare(tmp_path), prefix)
    assert saved == {"filename": f"{name}_00001_.png", "subfolder": subfolder, "type": "output"}
    assert (tmp_path / "output" / subfolder / saved["filename"]).is_file()


@pytest.mark.parametrize(
    "prefix",
    ["../img", "a/../../img", "/etc/img", "", "  ", ".", "..", "a/..", "/", "a\0b", "a\nb", "x" * 300, "link/img"],
)
def test_a_prefix_that_leads_out_or_is_no_name_is_refused(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "output" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(RequestError):
        save(bare(tmp_path), prefix)
    assert names(tmp_path) == []


def test_the_place_in_the_batch_is_a_variable_and_no_file_is_lost(tmp_path: Path) -> None:
    context = bare(tmp_path)
    for _ in range(2):
        save(context, "p%batch_num%", gradient(4, 6, 2))
    assert names(tmp_path / "output") == ["p0_00001_.png", "p0_00003_.png", "p1_00002_.png", "p1_00004_.png"]


NOW = datetime(2026, 3, 9, 7, 5, 4)
PROMPT: dict[str, Any] = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 42, "cfg": 4.5, "steps": 8.0, "model": ["4", 0]}},
    "5": {"class_type": "Empty", "inputs": {"width": 64, "tiled": True}, "_meta": {"title": "Empty Latent Image"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a/b:c?"}},
}


@pytest.mark.parametrize(
    ("prefix", "becomes"),
    [
        ("%width%x%height%", "640x480"),
        ("%year%-%month%-%day% %hour%.%minute%.%second%", "2026-03-09 07.05.04"),
        ("%date%", "2026-03-09"),
        ("%date:yyyy-MM-dd%/%date:hhmmss%", "2026-03-09/070504"),
        ("%date:yy-M-d h:m:s%", "26-3-9 7:5:4"),
        ("%KSampler.seed%_%KSampler.cfg%_%KSampler.steps%", "42_4.5_8"),
        ("%Empty Latent Image.width%%Empty Latent Image.tiled%", "64true"),
        ("%CLIPTextEncode.text%", "a_b_c_"),
        ("%Upscaler.width%", "32"),
        ("%KSampler.model%", "%KSampler.model%"),  # linked
        ("%KSampler.nosuch% %Nosuch.seed% %nosuch%", "%KSampler.nosuch% %Nosuch.seed% %nosuch%"),
        ("100% %", "100% %"),
        ("%batch_num%", "%batch_num%"),
    ],
)
def test_variables_of_a_prefix(prefix: str, becomes: str) -> None:
    nodes = [{"id": 8, "properties": {"Node name for S&R": "Upscaler"}}, {"id": 9}, "odd", {"properties": 5}]
    prompt = PROMPT | {"8": {"class_type": "LatentUpscale", "inputs": {"width": 32}}}
    context = bare(prompt=prompt, extra_pnginfo={"workflow": {"nodes": nodes}})
    assert filled(prefix, context, 640, 480, NOW) == becomes


@pytest.mark.parametrize("odd", [{"workflow": 5}, {"workflow": {"nodes": {"a": 1}}}, {"workflow": None}])
def test_odd_workflows_do_not_disturb_names(odd: dict[str, Any]) -> None:
    context = bare(prompt={"1": 5, "2": {"inputs": []}}, extra_pnginfo=odd)
    assert filled("%A.b%", context, 1, 1, NOW) == "%A.b%"


# Many at once


def test_threads_never_take_the_same_number(tmp_path: Path) -> None:
    saved: list[str] = []

    def work() -> None:
        saved.extend(each["filename"] for each in save(bare(tmp_path), images=gradient(2, 2, 3)))

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(saved) == [f"img_{number:05}_.png" for number in range(1, 37)]
    assert names(tmp_path / "output") == sorted(saved)


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_another_process_that_gives_numbers_is_waited_for(tmp_path: Path) -> None:
    """A lock on the folder keeps off other holders of the folder, whatever process they are in."""
    import fcntl

    context = bare(tmp_path)
    save(context)
    handle = os.open(tmp_path / "output", os.O_RDONLY)
    thread = threading.Thread(target=save, args=(context,))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.2)
        assert "img_00002_.png" not in names(tmp_path / "output")
        (tmp_path / "output" / "img_00002_.png").write_text("of the other process")
    finally:
        os.close(handle)
    thread.join(30)
    assert names(tmp_path / "output") == ["img_00001_.png", "img_00002_.png", "img_00003_.png"]
    assert (tmp_path / "output" / "img_00002_.png").read_text() == "of the other process"


def test_files_are_announced_before_they_appear_and_appear_whole(tmp_path: Path) -> None:
    announced: list[tuple[str, bool]] = []
    context = bare(tmp_path, note_file=lambda path: announced.append((path.name, path.exists())))
    saved = save(context, images=gradient(4, 6, 2))
    assert not any(there for _, there in announced)
    assert {each["filename"] for each in saved} < {name for name, _ in announced}
    assert names(tmp_path / "output") == [each["filename"] for each in saved]  # nothing temporary stays


def test_a_name_that_another_job_has_announced_is_passed_over(tmp_path: Path) -> None:
    def note(path: Path) -> None:
        if path.name.endswith("_00001_.png"):
            raise FileExistsError(path)

    (saved,) = save(bare(tmp_path, note_file=note), images=gradient(4, 6, 1))
    assert saved["filename"].endswith("_00002_.png")


def test_a_job_that_is_cancelled_or_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    class CancelledError(Exception):
        pass

    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 2:
            raise CancelledError

    with pytest.raises(CancelledError):
        save(bare(tmp_path, check=check), images=gradient(4, 6, 3))
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "output").write_text("a file, not a folder")
    with pytest.raises(RequestError, match=r"Cannot write img\.png"):
        save(bare(tmp_path))


# Contents


def test_pixels_come_back_as_they_were(tmp_path: Path) -> None:
    levels = torch.arange(256).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    (saved,) = save(bare(tmp_path), images=levels.float() / 255)
    image = read(tmp_path / "output" / saved["filename"])
    assert image.mode == "RGB"
    assert image.tobytes() == levels.to(torch.uint8).contiguous().numpy().tobytes()


def test_the_workflow_is_inside_where_comfyui_looks_for_it(tmp_path: Path) -> None:
    context = bare(tmp_path, prompt=PROMPT, extra_pnginfo={"workflow": {"nodes": ["größe"]}, "more": 1})
    (saved,) = save(context)
    text = read(tmp_path / "output" / saved["filename"]).text
    assert {key: json.loads(value) for key, value in text.items()} == {
        "prompt": PROMPT,
        "workflow": {"nodes": ["größe"]},
        "more": 1,
    }


def test_nothing_is_inside_where_it_is_not_wanted(tmp_path: Path) -> None:
    (saved,) = save(bare(tmp_path, prompt=PROMPT, extra_pnginfo={"workflow": {}}, metadata=False))
    assert read(tmp_path / "output" / saved["filename"]).text == {}


@pytest.mark.parametrize("key", ["", "日本", "k" * 80])
def test_a_key_that_png_cannot_hold_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(RequestError, match="extra_pnginfo"):
        save(bare(tmp_path, extra_pnginfo={key: 1}))
    assert names(tmp_path) == []


def test_numbers_that_are_none_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="NaN"):
        save(bare(tmp_path), images=torch.full((1, 2, 2, 3), torch.nan))
    assert names(tmp_path) == []


def test_previews_go_to_the_temp_folder_under_a_name_of_their_own(tmp_path: Path) -> None:
    context = bare(tmp_path)
    first, second = (inout.preview_image.run(context, images=gradient(4, 6)).ui["images"][0] for _ in range(2))
    assert first["type"] == "temp"
    assert first["subfolder"] == ""
    assert first["filename"] != second["filename"]
    for each in (first, second):
        assert read(tmp_path / "temp" / each["filename"]).size == (6, 4)
        assert each["filename"].startswith("ComfyUI_temp_")
        assert each["filename"].endswith("_00001_.png")


def test_pictures_sent_over_the_websocket_are_whole_and_sent_every_time() -> None:
    sent: list[Any] = []
    context = bare(report=lambda value, most, preview: sent.append((value, most, preview)))
    result = inout.save_image_websocket.run(context, images=gradient(4, 6, 2))
    assert result.ui == {}
    assert [(value, most) for value, most, _ in sent] == [(0, 2), (1, 2)]
    assert [preview.format for *_, preview in sent] == ["PNG", "PNG"]
    assert sent[1][2].tobytes() == (gradient(4, 6, 2)[1] * 255).round().to(torch.uint8).numpy().tobytes()
    is_changed = inout.save_image_websocket.is_changed
    assert is_changed is not None
    assert is_changed(context, images=None) is not is_changed(context, images=None)
