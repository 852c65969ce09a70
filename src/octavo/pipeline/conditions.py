"""What a picture is told, where, when and how strongly: one or many prompts for each side of the guidance.

A `Condition` is one prompt with its place and time. `arrange` lays the conditions of both sides onto latents of one
size; `mix` puts their predictions together: the mean, weighted at each latent pixel by strength, mask and area. With
one plain prompt a side that is the prediction itself, bit for bit.

The rules are ComfyUI's, so that its workflows give their pictures: see `arrange` for how areas of the two sides meet,
`_faded` for the edges of areas. Where nothing holds, the denoised estimate is 0.
"""

import math
from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import RequestError
from octavo.pipeline.control import Control
from octavo.pipeline.control import Placed as PlacedControl
from octavo.pipeline.encode import Conditioning
from octavo.sampling.flow import percent_to_sigma

FADE = 8  # latent pixels over which an area's weight rises from its edge, at most
SMALLEST = 8  # latent pixels a side, of the area around a mask

Area = tuple[int, int, int, int] | tuple[float, float, float, float]
"""Height, width, top, left: ints in latent pixels, floats in fractions of the latents."""


class Box(NamedTuple):
    """A rectangle in latent pixels."""

    height: int
    width: int
    top: int
    left: int

    def crop(self, x: Tensor) -> Tensor:
        """The part of [..., h, w] that it covers."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def holds(self, other: "Box") -> bool:
        """Whether `other` lies within it."""
        return (
            self.top <= other.top
            and self.left <= other.left
            and self.top + self.height >= other.top + other.height
            and self.left + self.width >= other.left + other.width
        )

    def within(self, height: int, width: int) -> "Box":
        """As far as it lies on latents of this size.

        Raises:
            RequestError: no part of it does.
        """
        if not (0 <= self.top < height and 0 <= self.left < width):
            raise RequestError(
                f"The area at x {8 * self.left}, y {8 * self.top} lies outside of the picture, which is "
                f"{8 * width}x{8 * height} pixels; move it inside or leave it out."
            )
        return Box(min(self.height, height - self.top), min(self.width, width - self.left), self.top, self.left)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Condition:
    """One prompt and where, when and how strongly it holds."""

    conditioning: Conditioning
    strength: float = 1.0
    area: Area | None = None  # None: everywhere
    mask: Tensor | None = None  # [1 or B, H, W] in [0, 1], any size; resized to the latents
    mask_strength: float = 1.0
    mask_bounds: bool = False  # the area is the rectangle around the mask
    start: float = 0.0  # fraction of the training timesteps, from pure noise
    end: float = 1.0  # likewise
    control: tuple[Control, ...] = ()  # ControlNets that its prediction follows

    def __post_init__(self) -> None:
        for name in ("strength", "mask_strength"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RequestError(f"{name} {getattr(self, name)} of a condition: need a number from 0 up.")
        if self.area is not None and not (len(self.area) == 4 and all(0 <= side < math.inf for side in self.area)):
            raise RequestError(f"area {self.area}: need height, width, top and left, all of them from 0 up.")
        if self.mask is not None and self.mask.dim() != 3:
            raise RequestError(f"A mask of shape {list(self.mask.shape)}: need [1 or batch, height, width].")

    def to(self, device: torch.device, dtype: torch.dtype) -> "Condition":
        """The same with its prompt on another device, in another dtype; itself where it is there already."""
        moved = self.conditioning.to(device, dtype)
        return self if moved is self.conditioning else replace(self, conditioning=moved)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placed:
    """A condition laid onto latents of one size."""

    conditioning: Conditioning
    box: Box | None  # None: all of the latents
    weight: float | Tensor  # of its prediction; a tensor is [1 or B, 1, height, width] of the box, float32
    first: float  # sigma from which on it holds, falling; rounded to float32
    last: float  # sigma down to which it holds; likewise
    control: tuple[PlacedControl, ...] = ()  # for the latents of the box

    def active(self, sigma: float) -> bool:
        """Whether it holds at this level; compared in float32, the precision of schedules."""
        return self.last <= c_float(sigma).value <= self.first

    def crop(self, x: Tensor) -> Tensor:
        """The part of [..., h, w] that it speaks of."""
        return x if self.box is None else self.box.crop(x)


class Arranged(NamedTuple):
    """Both sides of the guidance, laid onto latents of one size."""

    positive: tuple[Placed, ...]
    negative: tuple[Placed, ...]


def arrange(
    positive: Sequence[Condition], negative: Sequence[Condition], size: tuple[int, int], shift: float, like: Tensor
) -> Arranged:
    """Lay the conditions of both sides onto latents.

    Guidance compares the sides pixel by pixel, so a condition that holds in an area gets a counterpart there: the other
    side's condition with the smallest area around it, or its first one without an area, cropped and weighted as the
    condition is. It gets none where the other side has nothing around it, or its smallest is that very area.

    Args:
        positive, negative: in the user's order; the negative may be empty.
        size: h and w of the latents.
        shift: of the model's schedule, by which fractions of timesteps become sigmas.
        like: [B, ...]; weights are made for so many rows, on its device.

    Raises:
        RequestError: an area that lies outside of the latents.
    """
    sides = tuple([_Laid.of(condition, size) for condition in side] for side in (positive, negative))
    for mine, other in (sides, sides[::-1]):
        for laid in mine:
            other.extend(_counterpart(laid, other))
    return Arranged(*(tuple(laid.place(size, shift, like) for laid in side) for side in sides))


def mix(parts: Sequence[tuple[Placed, Tensor]], like: Tensor) -> Tensor:
    """The predictions of one side as one: their mean by weight, 0 where no weight is.

    Args:
        parts: each condition with its prediction for its box [B, C, height, width].
        like: [B, C, h, w], whose shape, dtype and device the result has.
    """
    if len(parts) == 1:
        ((placed, prediction),) = parts
        if placed.box is None and isinstance(placed.weight, float) and placed.weight > 0:
            return prediction
    summed = torch.zeros_like(like)
    total = torch.zeros_like(like[:, :1])
    for placed, prediction in parts:
        place = placed.crop(summed)
        place += prediction * placed.weight
        weights = placed.crop(total)
        weights += placed.weight
    return summed / total.clamp(min=torch.finfo(total.dtype).tiny)


@dataclass(frozen=True, slots=True)
class _Laid:
    """A condition whose area and mask have the latents' own units."""

    condition: Condition
    conditioning: Conditioning  # the condition's own, or that of the side it is the counterpart on
    box: Box | None  # as asked for: it may reach beyond the latents
    mask: Tensor | None  # [1 or B, h, w]

    @classmethod
    def of(cls, condition: Condition, size: tuple[int, int]) -> "_Laid":
        mask = None
        if condition.mask is not None:
            mask = condition.mask.float()
            if tuple(mask.shape[1:]) != size:
                mask = F.interpolate(mask[:, None], size=size, mode="bilinear")[:, 0]
        box = None
        if mask is not None and condition.mask_bounds:
            box = _bounds(mask)
        elif condition.area is not None:
            box = _in_pixels(condition.area, size)
        return cls(condition, condition.conditioning, box, mask)

    def place(self, size: tuple[int, int], shift: float, like: Tensor) -> Placed:
        box = None if self.box is None else self.box.within(*size)
        weight: float | Tensor = float(self.condition.strength)
        if self.mask is not None:
            mask = self.mask if box is None else box.crop(self.mask)
            weight = _rows(mask.to(like.device) * self.condition.mask_strength, len(like))[:, None] * weight
        elif box is not None:
            weight = _faded(box, size).to(like.device) * weight
        steering = tuple(control.place(size, shift, like) for control in self.condition.control)
        if box is not None:  # what they see of their pictures stays where it is
            steering = tuple(replace(each, hint=box.crop(each.hint)) for each in steering)
        return Placed(
            conditioning=self.conditioning,
            box=box,
            weight=weight,
            control=steering,
            first=c_float(percent_to_sigma(self.condition.start, shift)).value,
            last=c_float(percent_to_sigma(self.condition.end, shift)).value,
        )


def _counterpart(laid: _Laid, other: Sequence[_Laid]) -> list[_Laid]:
    """What the other side says in the area of `laid`, in a list; empty where `arrange` adds nothing."""
    if laid.box is None:
        return []
    around = [each for each in other if each.box is not None and each.box.holds(laid.box)]
    everywhere = [each for each in other if each.box is None]
    if around:
        closest = min(around, key=lambda each: each.box.height * each.box.width if each.box else 0)
        return [] if closest.box == laid.box else [replace(laid, conditioning=closest.conditioning)]
    return [replace(laid, conditioning=each.conditioning) for each in everywhere[:1]]


def _in_pixels(area: Area, size: tuple[int, int]) -> Box:
    """An area in latent pixels; fractions are rounded, and no side is less than 1."""
    units = (*size, *size) if any(isinstance(number, float) for number in area) else (1, 1, 1, 1)
    height, width, top, left = (round(number * unit) for number, unit in zip(area, units, strict=True))
    return Box(max(1, height), max(1, width), top, left)


def _bounds(mask: Tensor) -> Box:
    """The rectangle around all that is not 0 in any row of [B, h, w], at least `SMALLEST` a side."""
    rows, columns = torch.nonzero(mask.abs().amax(dim=0), as_tuple=True)
    if not len(rows):
        return Box(SMALLEST, SMALLEST, 0, 0)
    top, left = int(rows.min()), int(columns.min())
    height, width = int(rows.max()) - top + 1, int(columns.max()) - left + 1
    return Box(max(SMALLEST, height), max(SMALLEST, width), top, left)


def _faded(box: Box, size: tuple[int, int]) -> Tensor:
    """Weights [1, 1, height, width] of an area: 1, falling towards those of its edges that are not the picture's.

    The k-th row or column of r from the edge has k / r, where r is `FADE` or a quarter of the side if that is less.
    """
    sides = []
    for length, offset, whole in ((box.height, box.top, size[0]), (box.width, box.left, size[1])):
        reach = min(FADE, length // 4)
        ramp, side = torch.arange(1, reach + 1) / max(reach, 1), torch.ones(length)
        if offset > 0:
            side[:reach] *= ramp
        if offset + length < whole:
            side[length - reach :] *= ramp.flip(0)
        sides.append(side)
    return (sides[0][:, None] * sides[1])[None, None]


def _rows(mask: Tensor, count: int) -> Tensor:
    """[b, h, w] for `count` rows: as it is where one serves all, else cut or begun anew."""
    if len(mask) in (1, count):
        return mask
    return mask.repeat(math.ceil(count / len(mask)), 1, 1)[:count]
