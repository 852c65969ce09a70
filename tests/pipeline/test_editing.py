"""What is drawn on: masks grown and feathered, pictures made larger, and what is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

import octavo
from octavo.errors import RequestError
from octavo.pipeline.editing import outpainted, read_mask, shaped, source_of, widened
from octavo.pipeline.image import open_image, read_settings
from octavo.pipeline.request import GenerateRequest, resolve


def dot(size: tuple[int, int] = (64, 48), at: tuple[int, int] = (30, 20)) -> Image.Image:
    mask = Image.new("L", size)
    mask.putpixel(at, 255)
    return mask


@pytest.fixture(name="photo")
def a_photo(tmp_path: Path) -> Path:
    image = Image.new("RGB", (96, 64), (40, 90, 200))
    ImageDraw.Draw(image).rectangle((30, 20, 70, 50), fill=(250, 220, 50))
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_grown_mask_reaches_so_many_pixels_to_all_sides() -> None:
    grown = np.array(shaped(dot(), 3, 0)) > 0
    rows, columns = np.nonzero(grown)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (17, 23, 27, 33)
    assert grown.sum() == 49
    assert shaped(dot(), 0, 0) == dot()


def test_a_feather_softens_the_edge_and_moves_nothing() -> None:
    """A symmetric blur leaves a straight edge at half height where it was."""
    half = Image.new("L", (64, 16))
    half.paste(255, (32, 0, 64, 16))
    soft = np.array(shaped(half, 0, 8)).astype(int)[8]
    assert (np.diff(soft) >= 0).all()
    assert abs(soft[31] + soft[32] - 255) <= 2
    assert soft[20] == 0
    assert soft[44] == 255
    assert 8 < ((soft > 2) & (soft < 253)).sum() < 24


@pytest.mark.parametrize("borders", [(16, 0, 0, 0), (5, 7, 9, 11), (0, 0, 32, 0)])
def test_outpainting_keeps_the_picture_and_masks_all_that_is_new(borders: Any, photo: Path) -> None:
    image = open_image(photo)
    canvas, mask = outpainted(image, borders, 4)
    left, top, right, bottom = widened(image.size, borders)
    assert canvas.size == mask.size == (96 + left + right, 64 + top + bottom)
    assert all(side % 16 == 0 for side in canvas.size)
    assert all(0 <= more - wanted < 16 for more, wanted in zip(widened(image.size, borders), borders, strict=True))
    inside = (left, top, left + 96, top + 64)
    assert canvas.crop(inside).tobytes() == image.tobytes()
    levels = np.array(mask)
    kept = levels[top : top + 64, left : left + 96]
    new = np.ones(levels.shape, bool)
    new[top : top + 64, left : left + 96] = False
    assert (levels[new] == 255).all()
    assert kept[32, 48] == 0
    if left:  # 1 - d/5 at d pixels from the new
        assert kept[32, :5].tolist() == [204, 153, 102, 51, 0]
    else:
        assert kept[32, 0] == 0, "the picture's own edge is no seam"


def test_an_outpainted_picture_holds_the_old_one_pixel_by_pixel(tmp_path: Path) -> None:
    """All but the feathered border, whatever the VAE makes of it; and its settings make it again."""
    components = octavo.load(device="cpu", dtype="float32")
    small = octavo.generate(components, GenerateRequest(prompt="a red circle", seed=1, steps=1, width=64, height=64))[0]
    small.save(tmp_path / "small.png")
    request = GenerateRequest(
        prompt="a red circle", seed=2, steps=2, image=str(tmp_path / "small.png"), outpaint=(0, 0, 30, 0)
    )
    (wide,) = octavo.generate(components, request)
    assert wide.image.size == (96, 64)
    assert (wide.settings["width"], wide.settings["outpaint"]) == (96, (0, 0, 30, 0))
    assert wide.image.crop((0, 0, 48, 64)).tobytes() == small.image.crop((0, 0, 48, 64)).tobytes()
    assert wide.image.crop((64, 0, 96, 64)).getcolors() != [(32 * 64, (0, 0, 0))]
    wide.save(tmp_path / "wide.png")
    again = GenerateRequest.from_settings(read_settings(tmp_path / "wide.png"))
    assert octavo.generate(components, again)[0].image.tobytes() == wide.image.tobytes()


def test_a_mask_of_another_shape_is_refused_with_both_names(photo: Path, tmp_path: Path) -> None:
    dot((64, 64)).save(tmp_path / "mask.png")
    asked = GenerateRequest(prompt="x", image=str(photo), mask=str(tmp_path / "mask.png"))
    with pytest.raises(RequestError, match=r"mask mask\.png is 64x64, but photo\.png is 96x64.*Make it 96x64"):
        source_of(asked)
    dot((48, 32), (4, 4)).save(tmp_path / "half.png")  # smaller, but of its proportions
    assert read_mask(str(tmp_path / "half.png"), open_image(photo), str(photo)).size == (96, 64)
    (tmp_path / "mask.png").write_bytes(b"no picture")
    with pytest.raises(RequestError, match=r"mask\.png cannot be read as a picture"):
        source_of(asked)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mask_grow": -1, "mask": "m.png"}, "mask_grow -1 is out of range"),
        ({"mask_feather": 5000, "mask": "m.png"}, "mask_feather 5000 is out of range"),
        ({"mask_grow": 2}, "none is given; pass --mask"),
        ({"outpaint": (0, 0, 0, 0)}, "adds nothing"),
        ({"outpaint": (0, 0, -16, 0)}, "none below 0"),
        ({"outpaint": (16, 0, 0)}, "need left, top, right and bottom"),
        ({"outpaint": (16, 0, 0, 0), "mask": "m.png"}, "a mask of its own"),
        ({"outpaint": (16, 0, 0, 0), "image": None}, "pass --image"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        GenerateRequest(**{"prompt": "x", "image": "p.png"} | wrong)


def test_the_size_of_an_outpainted_picture_is_its_own(photo: Path) -> None:
    preset = octavo.load(device="cpu").preset
    asked = GenerateRequest(prompt="x", image=str(photo), outpaint=(0, 0, 32, 0), width=256, height=256)
    with pytest.raises(RequestError, match="has 128x64 pixels; leave the size out"):
        resolve(asked, preset, model="m", max_side=256)
