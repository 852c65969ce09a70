"""Multiply in INT8: the FP8 weight is remade row by row as INT8, of as many bytes, when the model is prepared.

Processors without FP8 arithmetic, CPUs as well as Ampere's GPUs, have fast INT8 dot products. The input is rounded too,
each row by a scale of its own, so this is for mode "fast". The plain definition is `dequantize_int8` of both and
F.linear: products and sums of INT8 are exact, so the results differ from it by float32's rounding only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.fp8.scale import Scaled, dequantize

MAX = 127
SMALLEST = 17  # rows that torch._int_mm takes on a GPU at least
ROWS_AT_ONCE = 256  # of the weight, in float32 meanwhile


def quantize_int8(x: Tensor) -> Scaled:
    """Round each row of `x` [rows, columns] to [-127, 127] times its scale [rows, 1], float32.

    INT8 has no code for NaN, so a row that holds one gets NaN as its scale.
    """
    scale = x.abs().amax(1, keepdim=True).float() / MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return Scaled((x.float() / scale).round_().clamp_(-MAX, MAX).to(torch.int8), scale)


def dequantize_int8(scaled: Scaled) -> Tensor:
    """q · scale in float32."""
    return scaled.q.float() * scaled.scale


def int8_twin(weight: Scaled) -> Scaled:
    """The FP8 weight [N, K] as INT8 with a scale for each row [N, 1]."""
    rows, columns = weight.q.shape
    q = torch.empty(rows, columns, dtype=torch.int8, device=weight.q.device)
    scale = torch.empty(rows, 1, device=weight.q.device)
    scales = weight.scale.expand(rows, 1)
    for start in range(0, rows, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        block = quantize_int8(dequantize(Scaled(weight.q[part], scales[part])))
        q[part], scale[part] = block.q, block.scale
    return Scaled(q, scale)


def packed_twin(weight: Scaled) -> Scaled:
    """`int8_twin` in the order of bytes that oneDNN's kernel reads; nothing else can be done with it."""
    twin = int8_twin(weight)
    return Scaled(torch.ops.onednn.qlinear_prepack(twin.q, None), twin.scale)


def int8_matmul(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    """x · weightᵀ + bias, x rounded row by row to INT8 by scales found from it.

    Args:
        x: [M, K] of any floating dtype.
        weight: a `packed_twin` of [N, K].
        bias: [N] or None.
        input_scale: not used: it was calibrated for FP8, and a row's own scale is finer.

    Returns:
        [M, N] in x's dtype.
    """
    rows, outputs = x.shape[0], weight.scale.shape[0]
    if rows == 0:
        return x.new_empty(0, outputs)
    quantized = quantize_int8(x)
    # Dot products of the AVX instructions take one factor unsigned: shifted by 128, which the kernel takes off again.
    codes = quantized.q.to(torch.int16).add_(128).to(torch.uint8)
    zeros = torch.zeros(outputs, dtype=torch.int64)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 128, weight.q, weight.scale.flatten(), zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    y *= quantized.scale
    if bias is not None:
        y += bias
    return y.to(x.dtype)


def int_mm_matmul(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    """As `int8_matmul` by torch._int_mm, which GPUs have; `weight` is an `int8_twin`, N and K divisible by 8."""
    return int_mm_scaled(quantize_int8(x), weight, bias, x.dtype)


def int_mm_scaled(x: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The second half of `int_mm_matmul`: x [M, K] in INT8 with scales [M, 1] → [M, N] in `dtype`."""
    rows = x.q.shape[0]
    codes = F.pad(x.q, (0, 0, 0, max(0, SMALLEST - rows)))
    sums = torch._int_mm(codes, weight.q.t())[:rows]
    y = sums.float() * x.scale * weight.scale.t()
    return (y if bias is None else y + bias).to(dtype)
