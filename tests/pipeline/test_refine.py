"""A part drawn anew: what it may touch, what the picture goes on telling, and what is refused."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import octavo
from octavo.errors import RequestError
from octavo.pipeline.components import Components
from octavo.pipeline.image import open_image, read_settings
from octavo.pipeline.refine import NOTE, Refinement, refine
from octavo.pipeline.request import GenerateRequest

ASKED = GenerateRequest(prompt="a red circle", seed=3, steps=2, guidance_scale=1.0, width=64, height=64)


@cache
def components() -> Components:
    return octavo.load(device="cpu", dtype="float32")


@pytest.fixture(name="picture")
def a_picture(tmp_path: Path) -> str:
    (drawn,) = octavo.generate(components(), GenerateRequest(prompt="a blue square", seed=1, steps=1))
    return str(drawn.save(tmp_path / "picture.png"))


def changed(before: str, after: Image.Image) -> tuple[int, int, int, int]:
    """x and y of the first pixel that differs, and of the first beyond the last."""
    differ = (np.array(open_image(before)) != np.array(after)).any(axis=2)
    rows, columns = np.nonzero(differ)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_only_the_region_changes_and_its_feather(picture: str) -> None:
    """A Gaussian of half the feather, in 8 bits, is gone within three times the feather of Pillow's box blurs."""
    sharp = refine(components(), picture, ASKED, Refinement(region=(20, 30, 40, 24), feather=0), denoise=1.0)
    assert sharp.image.size == (128, 128)
    assert changed(picture, sharp.image) == (20, 30, 60, 54)
    soft = refine(components(), picture, ASKED, Refinement(region=(40, 40, 40, 40), feather=6), denoise=1.0)
    left, top, right, bottom = changed(picture, soft.image)
    assert 40 - 18 <= left < 40
    assert 40 - 18 <= top < 40
    assert 80 < right <= 80 + 18
    assert 80 < bottom <= 80 + 18


def test_a_mask_says_the_same_as_its_region(picture: str, tmp_path: Path) -> None:
    mask = Image.new("RGB", (128, 128))
    ImageDraw.Draw(mask).rectangle((20, 30, 59, 53), fill="white")
    mask.save(tmp_path / "mask.png")
    by_mask = refine(components(), picture, ASKED, Refinement(mask=str(tmp_path / "mask.png")))
    by_region = refine(components(), picture, ASKED, Refinement(region=(20, 30, 40, 24)))
    assert by_mask.image.tobytes() == by_region.image.tobytes()


def test_edges_can_be_followed_and_the_more_denoise_the_more_changes(picture: str) -> None:
    def distance(denoise: float, follow: float = 0.0) -> float:
        part = Refinement(region=(16, 16, 96, 96), follow_edges=follow)
        found = refine(components(), picture, ASKED, part, denoise=denoise).image
        return float(np.abs(np.array(found, float) - np.array(open_image(picture), float)).mean())

    assert distance(0.2) < distance(1.0)
    assert distance(1.0, follow=1.0) != distance(1.0)


def test_the_picture_goes_on_telling_what_it_told(picture: str, tmp_path: Path) -> None:
    settings = read_settings(picture)
    once = refine(components(), picture, ASKED, Refinement(region=(8, 8, 32, 32))).save(tmp_path / "once.png")
    assert read_settings(once) == settings
    twice = refine(components(), str(once), ASKED, Refinement(region=(64, 64, 32, 32))).save(tmp_path / "twice.png")
    notes = json.loads(open_image(twice).info[NOTE])
    assert [note["region"] for note in notes] == [[8, 8, 32, 32], [64, 64, 32, 32]]
    assert (notes[0]["request"]["prompt"], notes[0]["request"]["seed"]) == ("a red circle", 3)
    assert not {"image", "mask"} & notes[0]["request"].keys(), "no paths of this machine"
    plain = Image.new("RGB", (64, 64), "white")
    plain.save(tmp_path / "plain.png")
    found = refine(components(), str(tmp_path / "plain.png"), ASKED, Refinement(region=(8, 8, 32, 32)))
    assert "octavo" not in open_image(found.save(tmp_path / "out.png")).info


@pytest.mark.parametrize("region", [(100, 0, 40, 40), (-1, 0, 40, 40), (0, 0, 4, 40), (0, 120, 40, 9)])
def test_a_region_outside_of_the_picture_is_refused_by_name(region: tuple[int, int, int, int], picture: str) -> None:
    with pytest.raises(RequestError, match=r"is not inside picture\.png, which is 128x128"):
        refine(components(), picture, ASKED, Refinement(region=region))


def test_what_cannot_be_meant_is_refused(picture: str, tmp_path: Path) -> None:
    for wrong in ({}, {"region": (0, 0, 16, 16), "mask": "m.png"}, {"region": (0, 0, 16, 16), "feather": -1}):
        with pytest.raises(RequestError):
            Refinement(**wrong)
    part = Refinement(region=(0, 0, 16, 16))
    with pytest.raises(RequestError, match="one part of one picture"):
        refine(components(), picture, GenerateRequest(prompt="x", batch=2), part)
    with pytest.raises(RequestError, match=r"denoise 1\.5 is out of range"):
        refine(components(), picture, ASKED, part, denoise=1.5)
    Image.new("L", (128, 128)).save(tmp_path / "black.png")
    with pytest.raises(RequestError, match="covers nothing"):
        refine(components(), picture, ASKED, Refinement(mask=str(tmp_path / "black.png")))
    Image.new("L", (64, 128)).save(tmp_path / "narrow.png")
    with pytest.raises(RequestError, match=r"narrow\.png is 64x128, but picture\.png is 128x128"):
        refine(components(), picture, ASKED, Refinement(mask=str(tmp_path / "narrow.png")))
