"""Multiply in FP8 by torch's own kernels: cuBLASLt and CUTLASS on a GPU, oneDNN on a CPU.

Both factors are FP8, so the input is rounded: by the calibrated scale where the file has one and the weight has one
scale, else row by row. The plain definition is `scale.dequantize` of both and F.linear.
"""

import torch
from torch import Tensor

from octavo.fp8.formats import E4M3FN
from octavo.fp8.scale import Scaled, quantize


def round_input(x: Tensor, weight: Scaled, input_scale: Tensor | None) -> Scaled:
    """x [M, K] as e4m3fn: one scale, shape [], where it was calibrated and the weight has one too, else [M, 1]."""
    if input_scale is not None and weight.scale.ndim == 0:
        return quantize(x, E4M3FN, scale=input_scale)
    return quantize(x, E4M3FN, "row")


def torch_matmul(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """x · weightᵀ + bias by torch._scaled_mm, the scales applied in float32 to its sums.

    Args:
        x: [M, K] bfloat16, or float32 on a CPU.
        weight: [N, K] e4m3fn; N and K divisible by 16 on a GPU.
        bias: [N] or None.
        input_scale: [] float32 of x, or None.

    Returns:
        [M, N] in x's dtype.
    """
    outputs = weight.q.shape[0]
    if x.shape[0] == 0:
        return x.new_empty(0, outputs)
    rounded = round_input(x, weight, input_scale)
    # torch wants either one scale on both sides or one for each row of x and each column of the weight's transpose.
    scale = weight.scale if rounded.scale.ndim == 0 else weight.scale.expand(outputs, 1).t().contiguous()
    return torch._scaled_mm(
        rounded.q,
        weight.q.t(),
        scale_a=rounded.scale,
        scale_b=scale,
        bias=None if bias is None else bias.to(x.dtype),
        out_dtype=x.dtype,
    )
