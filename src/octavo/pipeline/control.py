"""ControlNets beside the model: which pictures they are told to follow, how strongly, from when to when.

A `Control` belongs to a condition, as ComfyUI chains them on conditionings: the prediction for that prompt follows it.
Several at once add up. `denoise` asks `steer` for what they add to the model's blocks; their tables of modulation are
made before the first step and kept as the model's are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_float
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.devices import moved
from octavo.errors import RequestError, WrongModelError
from octavo.fp8 import at_sigmas
from octavo.models import MMDiT, MMDiTConfig, Modulation
from octavo.models.controlnet import ControlNet, ControlNetConfig, spread
from octavo.models.packed import Packed
from octavo.sampling.flow import percent_to_sigma

MAX_STRENGTH = 10.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Control:
    """One ControlNet and the picture it follows."""

    net: Callable[[], ControlNet]  # gives it, loaded; equal where it is the same net
    config: ControlNetConfig
    name: str  # of its file, for messages
    hint: Callable[[tuple[int, int]], Tensor]  # h and w of latents → the picture's [1 or B, 16, h, w], see `hints`
    strength: float = 1.0  # of what it adds, 0 to 10
    start: float = 0.0  # fraction of the training timesteps, from pure noise
    end: float = 1.0  # likewise

    def __post_init__(self) -> None:
        check_strength(self.strength, self.name)
        for number in (self.start, self.end):
            if not 0 <= number <= 1:
                raise RequestError(f"The ControlNet '{self.name}' from {self.start} to {self.end}: need 0 to 1.")

    def check(self, config: MMDiTConfig) -> None:
        """Refuse a model that it was not made for.

        Raises:
            WrongModelError: widths do not agree.
        """
        mine, theirs = [self.config.width, self.config.pooled_width], [config.width, config.pooled_width]
        if self.config.joint:
            mine, theirs = [*mine, self.config.context_width], [*theirs, config.context_width]
        if mine != theirs or self.config.in_channels != config.in_channels:
            raise WrongModelError(
                f"The ControlNet '{self.name}' steers models of width {mine[0]} that are told {mine[1]} channels "
                f"of pooled text; this model has {theirs[0]} and is told {theirs[1]}. Use one that was made for it: "
                "those of Stability AI are for SD3.5 Large."
            )
        if self.config.control_channels != config.in_channels:
            raise WrongModelError(
                f"The ControlNet '{self.name}' takes {self.config.control_channels} channels of control, a picture has "
                f"{config.in_channels}: it is for inpainting, which Octavo does without a ControlNet (--mask)."
            )

    def place(self, size: tuple[int, int], shift: float, like: Tensor) -> "Placed":
        """Lay it onto latents.

        Args:
            size: h and w of the latents.
            shift: of the model's schedule.
            like: has the device that its picture goes to.
        """
        return Placed(
            control=self,
            hint=self.hint(size).to(like.device),
            first=c_float(percent_to_sigma(self.start, shift)).value,
            last=c_float(percent_to_sigma(self.end, shift)).value,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placed:
    """A control laid onto latents of one size."""

    control: Control
    hint: Tensor  # [1 or B, 16, h, w]
    first: float  # sigma from which on it acts, falling; rounded to float32
    last: float  # sigma down to which it acts; likewise

    def active(self, sigma: float) -> bool:
        """Whether it acts at this level."""
        return self.control.strength != 0 and self.last <= c_float(sigma).value <= self.first


@dataclass(frozen=True, slots=True, eq=False)
class Pull:
    """What one net does to the rows of one call."""

    net: ControlNet
    hints: Tensor  # [B, 16, h, w], a picture for each row
    strengths: Tensor  # [B, 1, 1]
    modulations: Sequence[Modulation]  # B tables of one row


def pull(net: ControlNet, rows: Sequence[tuple[Placed, int, Modulation]], like: Tensor) -> Pull:
    """Gather what the rows of a call say to one net.

    Args:
        rows: for each question's part of the call its control, its number of rows and their table.
        like: the latents of the call, whose dtype and device the rest takes.
    """
    hints = [_repeated(placed.hint, count).to(like) for placed, count, _ in rows]
    strengths = [placed.control.strength for placed, count, _ in rows for _ in range(count)]
    modulations = [table for _, count, table in rows for _ in range(count)]
    return Pull(net, torch.cat(hints), moved(torch.tensor(strengths), like)[:, None, None], modulations)


def steer(
    mmdit: MMDiT,
    pulls: Sequence[Pull],
    part: slice,
    latents: Tensor,
    context: Tensor | Packed,
    sigmas: Sequence[float],
) -> list[Tensor | None]:
    """What ControlNets add to the tokens after each of the model's blocks, for `MMDiT.forward`; empty without any.

    Args:
        pulls: of the whole call.
        part: which of its rows are evaluated.
        latents, context, sigmas: of these rows.
    """
    summed: list[Tensor | None] = []
    tokens = context.rows if isinstance(context, Packed) else None
    for each in pulls:
        with at_sigmas(each.net, sigmas, tokens=tokens):
            residuals = each.net(
                latents,
                each.hints[part],
                context,
                Modulation.stack(each.modulations[part]),
                embed=mmdit.embed_image,
            )
        scaled = [residual * each.strengths[part] for residual in residuals]
        by_block = spread(scaled, mmdit.config.depth, last=each.net.config.last)
        summed = list(_sums(summed, by_block)) if summed else by_block
    return summed


def _sums(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    for a, b in zip(one, other, strict=True):
        yield a if b is None else b if a is None else a + b


def _repeated(hint: Tensor, count: int) -> Tensor:
    """[b, …] for `count` rows: one serves all, else cut or begun anew."""
    if len(hint) == 1:
        return hint.expand(count, -1, -1, -1)
    return hint.repeat(math.ceil(count / len(hint)), 1, 1, 1)[:count]


def check_strength(strength: float, name: str) -> None:
    """Refuse what is no strength of a ControlNet.

    Raises:
        RequestError: not a number from 0 to 10.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= MAX_STRENGTH:
        raise RequestError(
            f"The strength of the ControlNet '{name}' is {strength!r}: need a number from 0 to {MAX_STRENGTH:g}."
        )
