"""Pictures as files: the settings survive in every format, and files are written whole or not at all."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from octavo.errors import RequestError
from octavo.pipeline.image import Picture, a1111_parameters, open_image, read_settings

SETTINGS = {
    "prompt": "a fox, „schnell“ 狐\nat night",
    "negative_prompt": "blurry",
    "steps": 20,
    "sampler": "euler",
    "schedule": "simple",
    "guidance_scale": 4.5,
    "seed": 2**64 - 1,
    "width": 32,
    "height": 48,
    "model": "sd3.5: medium, mine",
    "shift": 3.0,
    "version": "1.2.3",
}


def picture() -> Picture:
    noise = random.Random(0).randbytes(32 * 48 * 3)
    return Picture(Image.frombytes("RGB", (32, 48), noise), SETTINGS)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".JPEG"])
def test_settings_come_back_from_every_format(tmp_path: Path, suffix: str) -> None:
    path = picture().save(tmp_path / "new" / f"x{suffix}")
    assert read_settings(path) == SETTINGS
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, suffix: str) -> None:
    path = picture().save(tmp_path / f"x{suffix}")
    assert open_image(path).convert("RGB").tobytes() == picture().image.tobytes()


def test_parameters_line_is_written_as_a1111_writes_it(tmp_path: Path) -> None:
    expected = (
        "a fox, „schnell“ 狐\nat night\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: euler, Schedule type: simple, CFG scale: 4.5, Seed: 18446744073709551615, Size: 32x48, "
        'Model: "sd3.5: medium, mine", Shift: 3.0, Version: Octavo 1.2.3'
    )
    assert a1111_parameters(SETTINGS) == expected
    assert open_image(picture().save(tmp_path / "x.png")).info["parameters"] == expected
    exif = open_image(picture().save(tmp_path / "x.jpg")).getexif().get_ifd(0x8769)
    assert exif[0x9286] == b"UNICODE\0" + expected.encode("utf-16-be")


@given(st.text())
def test_any_prompt_survives(prompt: str) -> None:
    settings = json.loads(json.dumps({**SETTINGS, "prompt": prompt}))
    assert prompt in a1111_parameters(settings)


@pytest.mark.parametrize("name", ["x", "x.gif", "x.pth"])
def test_formats_that_are_not_written_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match=r"\.png"):
        picture().save(tmp_path / name)


def test_a_folder_in_the_way_is_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    with pytest.raises(RequestError, match="Cannot write"):
        picture().save(tmp_path / "x.png")
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_damaged_pictures_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"broken\.png"):
        open_image(path)
    with pytest.raises(RequestError, match="no file"):
        open_image(tmp_path / "missing.png")


def test_pictures_without_our_settings_say_so(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    with pytest.raises(RequestError, match="no Octavo settings"):
        read_settings(tmp_path / "foreign.png")
