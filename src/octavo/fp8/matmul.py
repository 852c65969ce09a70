"""The ways to multiply by an FP8 weight, with the limits of each, in order of preference.

`plain` is the definition: the weight becomes a matrix of x's dtype, and F.linear does the rest. Every other backend is
proven against it; `backends` explains how one is chosen.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.fp8 import cpu
from octavo.fp8.backends import Backend, ComputeDtype, OnDevice, Operator, RoundsInput, Supported
from octavo.fp8.scale import Scaled, dequantize

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def plain_matmul(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    """The definition: x [M, K] · weight [N, K]ᵀ + bias, the weight rounded to x's dtype; takes no `input_scale`."""
    return F.linear(x, dequantize(weight, x.dtype), None if bias is None else bias.to(x.dtype))


PLAIN = Backend(name="plain", run=plain_matmul)
CPU = Backend(
    name="cpu",
    run=cpu.onednn_matmul,
    needs=(OnDevice("cpu"), ComputeDtype(FLOATS), Operator("mkldnn._linear_pointwise")),
)
CPU_BLAS = Backend(name="cpu-blas", run=cpu.blas_matmul, needs=(OnDevice("cpu"), ComputeDtype(FLOATS)))
CPU_BF16 = Backend(
    name="cpu-bf16",
    run=cpu.bfloat16_matmul,
    needs=(
        OnDevice("cpu"),
        ComputeDtype(FLOATS),
        RoundsInput("bfloat16"),
        Supported("bfloat16 arithmetic (avx512_bf16 or amx)", torch.cpu._is_avx512_bf16_supported),
    ),
)

BACKENDS: Sequence[Backend] = (CPU_BF16, CPU, CPU_BLAS, PLAIN)
