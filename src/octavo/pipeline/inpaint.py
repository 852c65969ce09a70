"""Pictures to start from and masks, as AUTOMATIC1111's users know them; Pillow only.

`prepare` fits a picture and its mask to the size that is drawn, cut to the masked part where that is wanted; `compose`
puts what was drawn back into the picture, so that nothing outside of the mask changes by a single bit.
"""

from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageFilter, ImageOps

from octavo.errors import RequestError

Box = tuple[int, int, int, int]  # left, top, right, bottom
ResizeMode = Literal["stretch", "crop", "pad"]

LARGEST_FILL = 4_000_000  # pixels


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is drawn from, and what it came from."""

    image: Image.Image  # RGB, as large as the picture to draw
    mask: Image.Image | None  # L, 255 = draw anew
    whole: Image.Image | None = None  # the picture that the drawn part goes back into; None where it is not put back
    soft_mask: Image.Image | None = None  # L, as large as `whole`
    box: Box | None = None  # of the part in `whole`; None for all of it

    def compose(self, drawn: Image.Image) -> Image.Image:
        """The finished picture from what was drawn."""
        if self.whole is None or self.soft_mask is None:
            return drawn
        layer = drawn.convert("RGB")
        if self.box is not None:
            left, top, right, bottom = self.box
            layer = self.whole.copy()
            layer.paste(
                drawn.convert("RGB").resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top)
            )
        finished = Image.composite(layer, self.whole, self.soft_mask)
        finished.info = dict(drawn.info)
        return finished


def prepare(
    image: Image.Image,
    mask: Image.Image | None,
    size: tuple[int, int],
    *,
    resize: ResizeMode = "stretch",
    invert: bool = False,
    blur: float = 0.0,
    fill: bool = False,
    only_masked: bool = False,
    padding: int = 0,
    hard: bool = True,
) -> Prepared:
    """Fit a picture and its mask to `size`.

    Args:
        image: RGB, RGBA or L.
        mask: the same; white, or opaque where it has transparency, is drawn anew.
        size: width and height of what is drawn, in pixels.
        resize: how a picture of another shape is made to fit: stretched, cut, or with its edges widened.
        invert: draw anew what is black instead.
        blur: radius in pixels by which the mask's edge is softened.
        fill: hide what lies under the mask behind the colours around it.
        only_masked: draw the masked part alone, at full size.
        padding: pixels around it that are seen, too.
        hard: make the mask black and white first; else L, as large as the picture, is taken as it is.

    Raises:
        RequestError: nothing is masked.
    """
    base = flat(image)
    if mask is None:
        return Prepared(fitted(base, size, resize), None)
    marked = binary(mask, base.size) if hard else mask
    if invert:
        marked = ImageOps.invert(marked)
    soft = marked.filter(ImageFilter.GaussianBlur(blur)) if blur else marked
    if soft.getbbox() is None:
        raise RequestError("The mask covers nothing; paint white what is to be drawn anew.")
    if only_masked:
        box = region(soft, size, padding)
        seen = filled(base, soft) if fill else base
        return Prepared(
            seen.crop(box).resize(size, Image.Resampling.LANCZOS),
            soft.crop(box).resize(size, Image.Resampling.LANCZOS),
            base,
            soft,
            box,
        )
    whole, soft = fitted(base, size, resize), fitted(soft, size, resize)
    return Prepared(filled(whole, soft) if fill else whole, soft, whole, soft)


def flat(image: Image.Image) -> Image.Image:
    """As RGB, what is transparent on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")


def binary(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask in black and white, as large as the picture; its transparency counts where it has any."""
    if mask.mode == "RGBA" and mask.getchannel("A").getextrema() != (255, 255):
        grey = mask.getchannel("A")
    else:
        grey = mask.convert("L")
    if grey.size != size:
        grey = grey.resize(size, Image.Resampling.BILINEAR)
    return grey.point(lambda value: 255 if value > 127 else 0)


def fitted(image: Image.Image, size: tuple[int, int], resize: ResizeMode) -> Image.Image:
    """`image` made as large as `size`, see `prepare`."""
    if image.size == size:
        return image.copy()
    if resize == "stretch":
        return image.resize(size, Image.Resampling.LANCZOS)
    if resize == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    scale = min(size[0] / image.width, size[1] / image.height)
    # However thin the picture, a line of it stays.
    length, height = (max(1, min(most, round(side * scale))) for side, most in zip(image.size, size, strict=True))
    inner = image.resize((length, height), Image.Resampling.LANCZOS)
    left, top = (size[0] - inner.width) // 2, (size[1] - inner.height) // 2
    # The outermost columns and rows, drawn out to the edge.
    wide = inner.resize((size[0], inner.height), box=(0, 0, 1, inner.height))
    last = inner.crop((inner.width - 1, 0, inner.width, inner.height))
    wide.paste(last.resize((size[0] - left, inner.height)), (left, 0))
    wide.paste(inner, (left, 0))
    tall = wide.crop((0, 0, size[0], 1)).resize(size)
    last = wide.crop((0, wide.height - 1, size[0], wide.height))
    tall.paste(last.resize((size[0], size[1] - top)), (0, top))
    tall.paste(wide, (0, top))
    return tall


def region(mask: Image.Image, size: tuple[int, int], padding: int) -> Box:
    """The part of the picture around the mask that has the shape of `size`, as far as the picture goes."""
    found = mask.getbbox()
    assert found is not None
    left, top = max(0, found[0] - padding), max(0, found[1] - padding)
    right, bottom = min(mask.width, found[2] + padding), min(mask.height, found[3] + padding)
    width, height = right - left, bottom - top
    if width * size[1] < height * size[0]:
        left, right = _widened(left, right, round(height * size[0] / size[1]), mask.width)
    else:
        top, bottom = _widened(top, bottom, round(width * size[1] / size[0]), mask.height)
    return left, top, right, bottom


def _widened(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """`low` to `high` made `length` long on both sides alike, within 0 to `limit`."""
    length = min(length, limit)
    start = min(max(0, low - (length - (high - low)) // 2), limit - length)
    return start, start + length


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """What lies under the mask replaced by the colours around it, the further inside the smoother.

    Source: the pull-push of Gortler et al. 1996, "The Lumigraph": halve what is known until nothing is missing, then
    come back, each finer picture over the coarser one.
    """
    if image.width * image.height > LARGEST_FILL:
        # What is filled in is smooth, so that a smaller picture tells it as well, in less memory.
        shrink = (LARGEST_FILL / (image.width * image.height)) ** 0.5
        size = max(1, int(image.width * shrink)), max(1, int(image.height * shrink))
        small = filled(image.resize(size), mask.resize(size))
        return Image.composite(small.resize(image.size, Image.Resampling.BICUBIC), image, mask)
    known = image.convert("RGBA")
    known.putalpha(ImageOps.invert(mask))
    levels = [known]
    while max(levels[-1].size) > 1:
        last = levels[-1]
        half = max(1, last.width // 2), max(1, last.height // 2)
        smaller = last.convert("RGBa").resize(half, Image.Resampling.BOX).convert("RGBA")
        # What is known in part is known: only its colour matters further up.
        smaller.putalpha(smaller.getchannel("A").point(lambda value: min(255, value * 4)))
        levels.append(smaller)
    result = flat(levels[-1]).convert("RGBA")
    for level in reversed(levels[:-1]):
        result = Image.alpha_composite(result.resize(level.size, Image.Resampling.BICUBIC), level)
    return flat(result)
