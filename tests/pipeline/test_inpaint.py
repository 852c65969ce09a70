"""Pictures and masks made to fit, and texts in pictures: laws that hold whatever comes."""

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw
from PIL.PngImagePlugin import PngInfo

from octavo.errors import RequestError
from octavo.pipeline import inpaint
from octavo.pipeline.image import a1111_parameters
from octavo.pipeline.inpaint import filled, fitted, prepare, region
from octavo.server.a1111_text import parameters_in, parsed

sides = st.integers(1, 90)
thin = st.sampled_from([(1, 3000), (3000, 1), (2, 3000)])
sizes = st.tuples(sides, sides)
big_sizes = st.tuples(st.integers(2, 8).map(lambda n: 16 * n), st.integers(2, 8).map(lambda n: 16 * n))


@given(sizes | thin, big_sizes, st.sampled_from(["stretch", "crop", "pad"]))
def test_a_picture_of_one_colour_stays_one_when_made_to_fit(size: Any, wanted: Any, resize: Any) -> None:
    found = fitted(Image.new("RGB", size, (10, 200, 30)), wanted, resize)
    assert found.size == wanted
    assert found.getcolors() == [(wanted[0] * wanted[1], (10, 200, 30))]


def test_padding_keeps_the_picture_whole_and_widens_its_edges() -> None:
    picture = Image.new("RGB", (40, 20), "blue")
    ImageDraw.Draw(picture).rectangle((0, 0, 19, 19), fill="red")
    wide = fitted(picture, (80, 20), "pad")
    assert wide.crop((20, 0, 60, 20)).tobytes() == picture.tobytes()
    assert (wide.getpixel((0, 5)), wide.getpixel((79, 5))) == ((255, 0, 0), (0, 0, 255))
    tall = fitted(picture, (40, 60), "pad")
    assert tall.crop((0, 20, 40, 40)).tobytes() == picture.tobytes()
    assert (tall.getpixel((0, 0)), tall.getpixel((39, 59))) == ((255, 0, 0), (0, 0, 255))


@st.composite
def masks(draw: Any) -> Image.Image:
    width, height = draw(sizes)
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


@given(masks(), big_sizes, st.integers(0, 30))
def test_the_part_around_a_mask_holds_it_and_lies_in_the_picture(mask: Image.Image, size: Any, padding: int) -> None:
    left, top, right, bottom = region(mask, size, padding)
    inner = mask.getbbox()
    assert inner is not None
    assert 0 <= left <= inner[0]
    assert 0 <= top <= inner[1]
    assert inner[2] <= right <= mask.width
    assert inner[3] <= bottom <= mask.height
    # As long as the picture is large enough, the part has the shape that is drawn.
    if right - left < mask.width and bottom - top < mask.height:
        assert abs((right - left) * size[1] - (bottom - top) * size[0]) <= max(size)


@given(masks(), big_sizes, st.booleans(), st.booleans(), st.sampled_from([0, 0, 3]))
def test_nothing_outside_the_mask_changes(mask: Any, size: Any, only: bool, fill: bool, blur: int) -> None:
    picture = Image.linear_gradient("L").resize(mask.size).convert("RGB")
    prepared = prepare(picture, mask, size, only_masked=only, fill=fill, blur=blur)
    assert prepared.image.size == size
    assert prepared.mask is not None
    assert prepared.mask.size == size
    finished = prepared.compose(Image.new("RGB", size, (1, 255, 3)))
    assert prepared.soft_mask is not None
    changed = ImageChops.difference(finished, prepared.whole or finished).convert("L")
    outside = prepared.soft_mask.point(lambda value: 255 if value == 0 else 0)
    assert ImageChops.multiply(changed, outside).getbbox() is None
    if only:
        assert prepared.whole is not None
        assert prepared.whole.tobytes() == picture.tobytes()


@pytest.mark.parametrize("largest", [1000, 10_000])
def test_filling_hides_what_is_masked_behind_what_is_around_it(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inpaint, "LARGEST_FILL", largest)
    picture = Image.new("RGB", (64, 64), (20, 90, 160))
    ImageDraw.Draw(picture).rectangle((20, 20, 43, 43), fill=(255, 0, 0))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    colours = filled(picture, mask).getextrema()
    for (low, high), wanted in zip(colours, (20, 90, 160), strict=True):
        assert abs(low - wanted) <= 6
        assert abs(high - wanted) <= 6


def test_masks_by_their_transparency_and_by_their_colour() -> None:
    picture = Image.new("RGB", (32, 32))
    clear = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 16, 32))
    dark = Image.new("RGB", (32, 32), "black")
    dark.paste((255, 255, 255), (0, 0, 16, 32))
    for mask in (clear, dark, dark.convert("L")):
        found = prepare(picture, mask, (32, 32)).mask
        assert found is not None
        assert found.getbbox() == (0, 0, 16, 32)
    with pytest.raises(RequestError, match="covers nothing"):
        prepare(picture, Image.new("L", (8, 8)), (32, 32))


# Texts

words = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=60)


@given(words, words, st.integers(0, 2**64 - 1), st.text(max_size=20))
def test_what_is_written_into_a_picture_is_read_from_it(prompt: str, negative: str, seed: int, model: str) -> None:
    settings = {
        "prompt": prompt, "negative_prompt": negative, "seed": seed, "steps": 4, "sampler": "euler", "width": 64,
        "height": 32, "model": model,
    }  # fmt: skip
    text = a1111_parameters(settings)
    found = parsed(text)
    assert (found["Seed"], found["Steps"], found["Size"]) == (str(seed), "4", "64x32")
    if "Negative prompt:" not in prompt:
        assert found["Prompt"] == prompt.strip()
        assert found["Negative prompt"] == negative.strip()


@given(
    st.dictionaries(st.text(st.characters(codec="latin-1", exclude_characters="\0"), min_size=1, max_size=70), words)
)
def test_any_texts_in_a_picture_are_read_without_fault(texts: dict[str, str]) -> None:
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value.replace("\0", ""))
    buffer = io.BytesIO()
    Image.new("L", (2, 2)).save(buffer, "PNG", pnginfo=info)
    found, _ = parameters_in(buffer.getvalue())
    parsed(found)


def test_a_text_made_to_take_long_does_not() -> None:
    import time

    start = time.monotonic()
    for text in (
        " " * 1_000_000,
        "a" * 1_000_000,
        'a: "' + "\\" * 500_000,
        "a:" * 300_000,
        "a b" * 300_000 + "\n" + "x" * 3999,
    ):
        parsed(text)
    assert time.monotonic() - start < 5
