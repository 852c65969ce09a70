"""A linear layer whose weight stays in FP8 in memory.

The forward here is the plain definition: dequantize at use, multiply in the input's dtype. Which layers become such
layers is for `quantize`, filling them from files for `checkpoint`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.fp8.formats import E4M3FN, Fp8Format
from octavo.fp8.scale import Granularity, Scaled, dequantize


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """How one linear layer keeps its weight."""

    format: Fp8Format = E4M3FN
    granularity: Granularity = "tensor"  # of the weight's scale; a row is an output channel
    input_scale: bool = False  # whether a calibrated scale of the input comes with it
    full_precision: bool = False  # never multiply in FP8: the file asks for it


class Fp8Linear(nn.Module):
    """y = x · (q · scale)ᵀ + bias.

    Attributes:
        q: [out, in] FP8 weight.
        scale: [] or [out, 1] float32; the weight is q · scale.
        input_scale: [] float32, for arithmetic that rounds the input to FP8 too, or None.
        bias: [out] in the compute dtype, or None.

    `q` and the scales keep their dtypes under `.to(dtype)`, `.half()` and the like, which only move them: another dtype
    would undo the quantization. They are buffers, so that optimizers leave them alone.
    """

    q: Tensor
    scale: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: LinearSpec,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        scale_shape = (out_features, 1) if spec.granularity == "row" else ()
        self.register_buffer("q", torch.zeros(out_features, in_features, dtype=spec.format.dtype, device=device))
        self.register_buffer("scale", torch.ones(scale_shape, dtype=torch.float32, device=device))
        self.register_buffer(
            "input_scale", torch.ones((), dtype=torch.float32, device=device) if spec.input_scale else None
        )
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], both in x's dtype."""
        weight = dequantize(Scaled(self.q, self.scale), x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.spec.format.name} by {self.spec.granularity}"
        )

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after: Tensor = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self
