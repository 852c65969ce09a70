"""Pictures that are drawn on: what is kept, what is drawn anew, and how the two meet.

Masks are white where the picture is drawn anew. They may be grown and feathered; to outpaint is to make the picture
larger and to mask what is new.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from octavo.errors import RequestError
from octavo.pipeline.bounds import MULTIPLE
from octavo.pipeline.image import open_image
from octavo.pipeline.inpaint import flat
from octavo.pipeline.latents import upright

ASPECT = 0.01  # by how much a mask's shape may differ from that of its picture
FURTHEST = 1024  # pixels of growth or feather
FEATHER = 16  # pixels over which an outpainted picture's own border is drawn anew, too

Borders = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


class Asked(Protocol):
    """The part of a request that is about a picture to draw on."""

    @property
    def image(self) -> str | None: ...
    @property
    def mask(self) -> str | None: ...
    @property
    def mask_grow(self) -> int: ...
    @property
    def mask_feather(self) -> int | None: ...
    @property
    def outpaint(self) -> Borders | None: ...


@dataclass(frozen=True, slots=True)
class Source:
    """What is drawn on."""

    image: Image.Image  # RGB, upright
    mask: Image.Image | None  # L, of its size; 255 = draw anew
    keep: bool = False  # whether what was not drawn anew is put back, pixel by pixel

    def kept(self, drawn: Image.Image) -> Image.Image:
        """The picture that was drawn, with what is kept of this one."""
        if not self.keep or self.mask is None:
            return drawn
        return Image.composite(drawn, self.image, self.mask)


def source_of(asked: Asked) -> Source | None:
    """The picture to draw on, made larger for outpainting, with its mask; None where none is asked for.

    Raises:
        RequestError: a file that cannot be read, or a mask of another shape.
    """
    if asked.image is None:
        return None
    image = flat(upright(open_image(asked.image)))
    if asked.outpaint is not None:
        canvas, mask = outpainted(image, asked.outpaint, FEATHER if asked.mask_feather is None else asked.mask_feather)
        return Source(canvas, mask, keep=True)
    if asked.mask is None:
        return Source(image, None)
    mask = read_mask(asked.mask, image, asked.image)
    return Source(image, shaped(mask, asked.mask_grow, asked.mask_feather or 0))


def read_mask(path: str, image: Image.Image, image_path: str) -> Image.Image:
    """A mask, L and as large as its picture.

    Raises:
        RequestError: it cannot be read, or is of another shape.
    """
    mask = upright(open_image(path))
    if abs(mask.width * image.height / (mask.height * image.width) - 1) > ASPECT:
        raise RequestError(
            f"The mask {Path(path).name} is {mask.width}x{mask.height}, but {Path(image_path).name} is "
            f"{image.width}x{image.height}: a mask marks places of its picture and needs its proportions. Make it "
            f"{image.width}x{image.height}."
        )
    return flat(mask).convert("L").resize(image.size, Image.Resampling.BILINEAR)


def shaped(mask: Image.Image, grow: int, feather: int) -> Image.Image:
    """A mask L grown by so many pixels to all sides, then softened over about as many as `feather`."""
    if grow:
        levels = torch.from_numpy(np.array(mask)).float()[None, None]
        for _ in range(2):  # along the rows, then along the columns: a square takes no more than that
            levels = F.max_pool2d(levels, (2 * grow + 1, 1), stride=1, padding=(grow, 0)).transpose(2, 3)
        mask = Image.fromarray(levels[0, 0].byte().numpy())
    return mask.filter(ImageFilter.GaussianBlur(feather / 2)) if feather else mask


def outpainted(image: Image.Image, borders: Borders, feather: int) -> tuple[Image.Image, Image.Image]:
    """A picture with room around it, and the mask of what is to be drawn there.

    Args:
        image: RGB.
        borders: pixels to add; right and bottom get a few more, so that the sides are multiples of 16.
        feather: pixels of the picture's own border that are drawn anew as well, the nearer to the new the more.

    Returns:
        The larger picture, whose outermost pixels are drawn out into the room, and its mask, L.
    """
    left, top, right, bottom = widened(image.size, borders)
    canvas = np.pad(np.array(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    height, width = canvas.shape[:2]
    across, down = (
        _ramp(length, before, inside, feather)
        for length, before, inside in ((width, left, image.width), (height, top, image.height))
    )
    mask = np.maximum(across[None, :], down[:, None])
    return Image.fromarray(canvas), Image.fromarray((mask * 255).round().astype(np.uint8))


def _ramp(length: int, before: int, inside: int, feather: int) -> np.ndarray:
    """Along one side: 1 in the room, falling to 0 over `feather` pixels of the picture, but not from its own edge."""
    place = np.arange(length)
    after = length - before - inside
    depth = np.full(length, np.inf)
    if before:
        depth = np.minimum(depth, place - before + 1)
    if after:
        depth = np.minimum(depth, before + inside - place)
    return np.clip(1 - depth / (feather + 1), 0, 1)


def widened(size: tuple[int, int], borders: Borders) -> Borders:
    """The borders with so much more at right and bottom that a picture of this size gets sides of multiples of 16."""
    left, top, right, bottom = borders
    return left, top, right + -(size[0] + left + right) % MULTIPLE, bottom + -(size[1] + top + bottom) % MULTIPLE


def outpainted_size(path: str, borders: Borders) -> tuple[int, int]:
    """Width and height of a picture with room around it.

    Raises:
        RequestError: the picture cannot be read.
    """
    image = upright(open_image(path))
    left, top, right, bottom = widened(image.size, borders)
    return image.width + left + right, image.height + top + bottom


def check_editing(asked: Asked) -> None:
    """Refuse what cannot be meant, before any file is opened.

    Raises:
        RequestError: says what.
    """
    for name in ("mask_grow", "mask_feather"):
        value = getattr(asked, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= FURTHEST):
            raise RequestError(f"{name} {value!r} is out of range: whole pixels from 0 to {FURTHEST}.")
    if asked.outpaint is None:
        if asked.mask is None and (asked.mask_grow or asked.mask_feather):
            raise RequestError("mask_grow and mask_feather change a mask, but none is given; pass --mask.")
        return
    borders = asked.outpaint
    if len(borders) != 4 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in borders):
        raise RequestError(f"outpaint {borders}: need left, top, right and bottom in pixels, none below 0.")
    if not any(borders):
        raise RequestError("outpaint 0,0,0,0 adds nothing; say how many pixels at left, top, right and bottom.")
    if asked.image is None:
        raise RequestError("Outpainting makes a picture larger, but none is given; pass --image.")
    if asked.mask is not None or asked.mask_grow:
        raise RequestError("Outpainting has a mask of its own: do one after the other, the mask or the outpainting.")
