"""Weights and inputs that the tests of FP8 multiplication share."""

import torch
from torch import Tensor

from octavo.fp8 import E4M3FN, Fp8Format, Granularity, Scaled
from octavo.fp8.backends import Backend
from octavo.fp8.scale import dequantize, scale_shape

BLOCK = (24, 40)  # fits neither the shapes of the tests nor vectors


def every_finite_code(rows: int, columns: int, fmt: Fp8Format) -> Tensor:
    """[rows, columns] of `fmt`, all finite codes in turn."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[torch.isfinite(codes.view(fmt.dtype).float())]
    return codes.repeat(-(-rows * columns // len(codes)))[: rows * columns].view(fmt.dtype).view(rows, columns)


def weight(rows: int, columns: int, fmt: Fp8Format = E4M3FN, granularity: Granularity = "tensor") -> Scaled:
    """A weight of every finite code in a shuffled order, with scales that are no powers of two."""
    generator = torch.Generator().manual_seed(rows + columns)
    q = every_finite_code(rows, columns, fmt).view(torch.uint8).flatten()
    q = q[torch.randperm(len(q), generator=generator)].view(rows, columns).view(fmt.dtype)
    scale = torch.rand(scale_shape(rows, columns, granularity, BLOCK), generator=generator) * 0.01 + 0.001
    return Scaled(q, scale, BLOCK if granularity == "block" else None)


def nearest_e4m3fn(x: Tensor) -> Tensor:
    """Each number's nearest among those that e4m3fn has, of two as near the one of even code; larger ones clamped.

    An oracle of its own: the format's numbers are written down from its definition (Micikevicius et al. 2022, table 1:
    four bits of exponent biased by 7, three of mantissa, subnormal numbers below 2⁻⁶), and searched.
    """
    table = torch.tensor(
        [(code % 8) * 2.0**-9 if code < 8 else (1 + (code % 8) / 8) * 2.0 ** (code // 8 - 7) for code in range(127)],
        dtype=torch.float64,
    )
    size = x.double().abs().clamp(max=448).contiguous()
    above = torch.searchsorted(table, size).clamp(1, 126)
    below = above - 1
    lower, upper = size - table[below], table[above] - size
    code = torch.where((upper < lower) | ((upper == lower) & (above % 2 == 0)), above, below)
    return table[code].copysign(x.double())


def w8a8(x: Tensor, scaled: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`exact`, x rounded before to e4m3fn by `input_scale` or else by each row's amax / 448 (1 for rows of zeros)."""
    rows = x.float().abs().amax(1, keepdim=True) / 448
    scale = torch.where(rows > 0, rows, 1.0) if input_scale is None else input_scale
    return exact(nearest_e4m3fn(x.float() / scale) * scale.double(), scaled, bias)


def exact(x: Tensor, scaled: Scaled, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x · weightᵀ + bias in float64, and Σ |x| |weight| + |bias|: what rounding errors are measured against."""
    w = dequantize(scaled, torch.float64)
    b = torch.zeros(w.shape[0], dtype=torch.float64) if bias is None else bias.double()
    return x.double() @ w.t() + b, x.double().abs() @ w.abs().t() + b.abs()


def error(backend: Backend, x: Tensor, scaled: Scaled, bias: Tensor | None, input_scale: Tensor | None = None) -> float:
    """Largest error of `backend` in units of Σ |x| |weight| + |bias|."""
    ready = scaled if backend.twin is None else backend.twin(scaled)
    y = backend.run(x, ready, bias, input_scale)
    assert y.dtype == x.dtype
    expected, size = exact(x, scaled, bias)
    return float(((y.double() - expected).abs() / size.clamp_min(1e-30)).max())
