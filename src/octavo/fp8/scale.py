"""Into FP8 and out of it, by the plain definition: x ≈ q · scale.

`scale` is always the factor that dequantizes, as in checkpoint files and in `torch._scaled_mm`, and always float32: one
number for the whole tensor, shape [], or one for each row, shape [rows, 1].
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo.fp8.formats import E4M3FN, Fp8Format

Granularity = Literal["tensor", "row"]


@dataclass(frozen=True, slots=True)
class Scaled:
    """A matrix in FP8 with what it takes to read it."""

    q: Tensor  # [rows, columns] FP8
    scale: Tensor  # [] or [rows, 1] float32


def scale_from_amax(amax: Tensor, fmt: Fp8Format) -> Tensor:
    """The scale that maps `amax` to the format's largest value; 1 where it would be 0 and not divide anything."""
    scale = amax.float() / fmt.max
    return torch.where(scale > 0, scale, 1.0)


def amax(x: Tensor, granularity: Granularity) -> Tensor:
    """Largest absolute value of all of `x` (shape []), or of each row along the last axis (shape [..., 1])."""
    return x.abs().amax() if granularity == "tensor" else x.abs().amax(dim=-1, keepdim=True)


def quantize(
    x: Tensor, fmt: Fp8Format = E4M3FN, granularity: Granularity = "tensor", scale: Tensor | None = None
) -> Scaled:
    """Round `x` to FP8, to nearest with ties to even.

    Args:
        x: any floating dtype, finite.
        fmt: the format of the result.
        granularity: what shares a scale, where `scale` is not given.
        scale: use this one; what it maps beyond the format's range becomes the largest value.

    Returns:
        `q` of x's shape and a float32 scale. With a scale from `x` itself, the error of a value is at most half a step
        of the format: |x| · 2^-(mantissa_bits + 1) for normal numbers, scale · fmt.smallest / 2 below them.
    """
    if scale is None:
        scale = scale_from_amax(amax(x, granularity), fmt)
    # Clamp before the cast: what an overflowing cast gives differs between formats (e4m3fn gives NaN or saturates,
    # e5m2 gives infinity) and between torch versions.
    q = (x.float() / scale).clamp(-fmt.max, fmt.max).to(fmt.dtype)
    return Scaled(q, scale)


def quantize_input(x: Tensor, input_scale: Tensor | None) -> Scaled:
    """Activations as W8A8 arithmetic sees them: e4m3fn by the calibrated scale, or by a scale for each row.

    Args:
        x: [M, K].
        input_scale: [] float32, calibrated: one for all of `x`, whose larger values are clamped. None: each row is
            scaled by its own largest value.

    Returns:
        q [M, K], scale [] or [M, 1].
    """
    return quantize(x, E4M3FN, "row") if input_scale is None else quantize(x, E4M3FN, scale=input_scale)


def dequantize(scaled: Scaled, dtype: torch.dtype = torch.float32) -> Tensor:
    """q · scale, computed in float32 and rounded once to `dtype`."""
    return (scaled.q.float() * scaled.scale).to(dtype)
