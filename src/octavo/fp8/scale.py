"""Into FP8 and out of it, by the plain definition: x ≈ q · scale.

`scale` is always the factor that dequantizes, as in checkpoint files and in `torch._scaled_mm`, and always float32: one
number for the whole tensor, shape []; or one for each row, shape [rows, 1]; or one for each block of n rows and k
columns, shape [⌈rows / n⌉, ⌈columns / k⌉], the blocks at the edges being as small as what is left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.fp8.formats import E4M3FN, Fp8Format

Granularity = Literal["tensor", "row", "block"]
Form = Literal["e4m3fn", "int8"]  # of an input in 8 bits
Block = tuple[int, int]  # rows and columns
BLOCK: Block = (128, 128)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A matrix in FP8 with what it takes to read it."""

    q: Tensor  # [rows, columns] FP8
    scale: Tensor  # [] or [rows, 1] or by block, float32
    block: Block | None = None  # what shares a scale, where that is a block


def scale_from_amax(amax: Tensor, fmt: Fp8Format) -> Tensor:
    """The scale that maps `amax` to the format's largest value; 1 where it would be 0 and not divide anything."""
    scale = amax.float() / fmt.max
    return torch.where(scale > 0, scale, 1.0)


def scale_shape(rows: int, columns: int, granularity: Granularity, block: Block = BLOCK) -> tuple[int, ...]:
    """The shape of the scales of a matrix."""
    if granularity == "block":
        return math.ceil(rows / block[0]), math.ceil(columns / block[1])
    return (rows, 1) if granularity == "row" else ()


def amax(x: Tensor, granularity: Granularity, block: Block = BLOCK) -> Tensor:
    """Largest absolute values: of all of `x` (shape []), of each row along the last axis (shape [..., 1]), or of each
    block of a matrix."""
    if granularity == "tensor":
        return x.abs().amax()
    if granularity == "row":
        return x.abs().amax(dim=-1, keepdim=True)
    (rows, columns), (n, k) = x.shape, block
    down, across = scale_shape(rows, columns, "block", block)
    padded = F.pad(x.abs(), (0, across * k - columns, 0, down * n - rows))
    return padded.view(down, n, across, k).amax(dim=(1, 3))


def quantize(
    x: Tensor,
    fmt: Fp8Format = E4M3FN,
    granularity: Granularity = "tensor",
    scale: Tensor | None = None,
    block: Block = BLOCK,
) -> Scaled:
    """Round `x` to FP8, to nearest with ties to even.

    Args:
        x: any floating dtype, finite; a matrix, where scales are by block.
        fmt: the format of the result.
        granularity: what shares a scale.
        scale: use this one; what it maps beyond the format's range becomes the largest value.
        block: rows and columns that share a scale, where granularity is "block".

    Returns:
        `q` of x's shape and a float32 scale. With a scale from `x` itself, the error of a value is at most half a step
        of the format: |x| · 2^-(mantissa_bits + 1) for normal numbers, scale · fmt.smallest / 2 below them.
    """
    if scale is None:
        scale = scale_from_amax(amax(x, granularity, block), fmt)
    scaled_by = block if granularity == "block" else None
    each = scale if scaled_by is None else spread(scale, x.shape, block)
    # Clamp before the cast: what an overflowing cast gives differs between formats (e4m3fn gives NaN or saturates,
    # e5m2 gives infinity) and between torch versions.
    q = (x.float() / each).clamp(-fmt.max, fmt.max).to(fmt.dtype)
    return Scaled(q, scale, scaled_by)


def quantize_input(x: Tensor, input_scale: Tensor | None) -> Scaled:
    """Activations as W8A8 arithmetic sees them: e4m3fn by the calibrated scale, or by a scale for each row.

    Args:
        x: [M, K].
        input_scale: float32, calibrated: [], one for all of `x`, or [M, 1], one for each row, clamping what is larger.
            None: each row is scaled by its own largest value.

    Returns:
        q [M, K], scale [] or [M, 1].
    """
    return quantize(x, E4M3FN, "row") if input_scale is None else quantize(x, E4M3FN, scale=input_scale)


def dequantize(scaled: Scaled, dtype: torch.dtype = torch.float32) -> Tensor:
    """q · scale, computed in float32 and rounded once to `dtype`."""
    scale = scaled.scale if scaled.block is None else spread(scaled.scale, scaled.q.shape, scaled.block)
    return (scaled.q.float() * scale).to(dtype)


def spread(scale: Tensor, shape: Sequence[int], block: Block) -> Tensor:
    """Scales by block as a matrix of `shape`: for each number its own."""
    rows, columns = shape
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
