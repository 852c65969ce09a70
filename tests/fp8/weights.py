"""Weights and inputs that the tests of FP8 multiplication share."""

import torch
from torch import Tensor

from octavo.fp8 import E4M3FN, Fp8Format, Granularity, Scaled
from octavo.fp8.backends import Backend
from octavo.fp8.scale import dequantize


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
    scale = torch.rand((rows, 1) if granularity == "row" else (), generator=generator) * 0.01 + 0.001
    return Scaled(q, scale)


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
