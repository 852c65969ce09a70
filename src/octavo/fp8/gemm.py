"""Multiply in FP8 by torch's own kernels: cuBLASLt and CUTLASS on a GPU, oneDNN on a CPU.

Both factors are FP8, so the input is rounded. The plain definition is `matmul.plain_w8a8`.
"""

import torch
from torch import Tensor

from octavo.fp8.scale import Scaled, quantize_input


def torch_matmul(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """x · weightᵀ + bias by torch._scaled_mm, the scales applied in float32 to its sums.

    Args:
        x: [M, K] bfloat16, or float32 on a CPU.
        weight: [N, K] e4m3fn; N and K divisible by 16 on a GPU.
        bias: [N] or None.
        input_scale: [] or [M, 1] float32 of x, or None.

    Returns:
        [M, N] in x's dtype.
    """
    return torch_scaled(quantize_input(x, input_scale), weight, bias, x.dtype)


def torch_scaled(x: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The second half of `torch_matmul`: x [M, K] in e4m3fn, its scale [] or [M, 1], → [M, N] in `dtype`."""
    rows, outputs = x.q.shape[0], weight.q.shape[0]
    if rows == 0:
        return weight.scale.new_empty(0, outputs, dtype=dtype)
    # torch wants either one scale on both sides or one for each row of x and each column of the weight's transpose.
    x_scale, scale = x.scale, weight.scale
    if x_scale.ndim or scale.ndim:
        x_scale = x_scale if x_scale.ndim else x_scale.view(1, 1).repeat(rows, 1)
        scale = scale.t() if scale.ndim else scale.view(1, 1).repeat(1, outputs)
    return torch._scaled_mm(
        x.q,
        weight.q.t(),
        scale_a=x_scale,
        scale_b=scale,
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
    )
