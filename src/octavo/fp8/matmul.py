"""The ways to multiply by an FP8 weight, with the limits of each, in order of preference.

`plain` is the definition: the weight becomes a matrix of x's dtype, and F.linear does the rest. `plain-w8a8` is the
definition of the arithmetic that rounds the input to FP8 too. Every other backend is proven against one of them;
`backends` explains how one is chosen.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.fp8 import cpu, gemm, int8
from octavo.fp8.backends import Backend
from octavo.fp8.formats import E4M3FN
from octavo.fp8.needs import (
    Capability,
    ComputeDtype,
    DivisibleBy,
    Formats,
    Granularities,
    OnDevice,
    OnlyByName,
    Operator,
    Package,
    RoundsInput,
    Supported,
)
from octavo.fp8.scale import Scaled, dequantize, quantize_input

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
ONE_SCALE_A_ROW = Granularities(("tensor", "row"))  # so that it can be applied to the product


def plain_matmul(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    """The definition: x [M, K] · weight [N, K]ᵀ + bias, the weight rounded to x's dtype; takes no `input_scale`."""
    return F.linear(x, dequantize(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def plain_wide(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    """`plain_matmul` where nothing overflows: in bfloat16, if that is x's dtype, else in float32."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    return plain_matmul(x.to(dtype), weight, bias, None).to(x.dtype)


def plain_w8a8(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """The definition of FP8 by FP8: x [M, K] rounded to e4m3fn, times weight [N, K]ᵀ, plus bias, all in float32.

    x is rounded by `input_scale`, [] or [M, 1], where there is one, else row by row (see `scale.quantize_input`). That
    is what GPUs compute, so the quality of their arithmetic can be measured on any machine.

    Returns:
        [M, N], rounded once to x's dtype.
    """
    return plain_scaled(quantize_input(x, input_scale), weight, bias, x.dtype)


def plain_scaled(x: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The second half of `plain_w8a8`: x [M, K] in 8 bits, its scale [] or [M, 1], → [M, N] in `dtype`."""
    return F.linear(dequantize(x), dequantize(weight), None if bias is None else bias.float()).to(dtype)


def triton_then_torch(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """`gemm.torch_matmul`, its input rounded by `kernels.quantize` in one pass over memory."""
    from octavo.fp8.kernels.quantize import quantize_rows

    return gemm.torch_scaled(quantize_rows(x, input_scale), weight, bias, x.dtype)


def triton_then_int_mm(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    """`int8.int_mm_matmul`, likewise."""
    from octavo.fp8.kernels.quantize import quantize_rows

    return int8.int_mm_scaled(quantize_rows(x, form="int8"), weight, bias, x.dtype)


def triton_w8a8(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """`kernels.matmul.w8a8`."""
    from octavo.fp8.kernels.matmul import w8a8

    return w8a8(x, weight, bias, input_scale)


def triton_w8a8_scaled(x: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`kernels.matmul.w8a8_scaled`."""
    from octavo.fp8.kernels.matmul import w8a8_scaled

    return w8a8_scaled(x, weight, bias, dtype)


def triton_w8a16(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    """`kernels.matmul.w8a16`; needs no `input_scale`, since x is not rounded."""
    from octavo.fp8.kernels.matmul import w8a16

    return w8a16(x, weight, bias)


def triton_int8(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    """`kernels.matmul.int8`; `input_scale` was calibrated for FP8, and a row's own scale is finer."""
    from octavo.fp8.kernels.matmul import int8 as multiply

    return multiply(x, weight, bias)


def triton_int8_scaled(x: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`kernels.matmul.int8_scaled`."""
    from octavo.fp8.kernels.matmul import int8_scaled

    return int8_scaled(x, weight, bias, dtype)


PLAIN = Backend(name="plain", about="the definition: dequantize, then F.linear", run=plain_matmul)
PLAIN_WIDE = Backend(
    name="plain-wide",
    about="the definition in bfloat16 or float32, for layers that overflow",
    run=plain_wide,
    needs=(OnlyByName(),),
)
PLAIN_W8A8 = Backend(
    name="plain-w8a8",
    about="the definition of FP8 by FP8: what GPUs compute, on any machine",
    run=plain_w8a8,
    run_scaled=plain_scaled,
    needs=(OnlyByName(), RoundsInput("e4m3fn")),
)
CPU = Backend(
    name="cpu",
    about="decode block by block, oneDNN's float32 GEMM",
    run=cpu.onednn_matmul,
    needs=(OnDevice("cpu"), ComputeDtype(FLOATS), Operator("mkldnn._linear_pointwise")),
)
CPU_BLAS = Backend(
    name="cpu-blas",
    about="the same, by F.linear's GEMM",
    run=cpu.blas_matmul,
    needs=(OnDevice("cpu"), ComputeDtype(FLOATS)),
)
CPU_BF16 = Backend(
    name="cpu-bf16",
    about="input rounded to bfloat16, AVX-512's bfloat16 GEMM",
    run=cpu.bfloat16_matmul,
    needs=(
        OnDevice("cpu"),
        ComputeDtype(FLOATS),
        RoundsInput("bfloat16"),
        ONE_SCALE_A_ROW,
        Supported("bfloat16 arithmetic (avx512_bf16)", torch.cpu._is_avx512_bf16_supported),
    ),
)
CPU_INT8 = Backend(
    name="cpu-int8",
    about="weight remade as INT8, input rounded to INT8 by row, oneDNN",
    run=int8.int8_matmul,
    twin=int8.packed_twin,
    needs=(
        OnDevice("cpu"),
        ComputeDtype(FLOATS),
        RoundsInput("int8"),
        ONE_SCALE_A_ROW,
        Operator("onednn.qlinear_pointwise"),
        # Without it, oneDNN adds products in pairs in 16 bits, where two large ones do not fit: wrong without a word.
        Supported("VNNI", torch.cpu._is_vnni_supported),
    ),
)
TORCH = Backend(
    name="torch",
    about="FP8 by FP8, torch._scaled_mm",
    run=gemm.torch_matmul,
    run_scaled=gemm.torch_scaled,
    needs=(
        OnDevice("cuda"),
        Capability(8, 9),
        RoundsInput("e4m3fn"),
        Formats((E4M3FN,)),
        ONE_SCALE_A_ROW,
        ComputeDtype((torch.bfloat16,)),
        DivisibleBy("K", 16),
        DivisibleBy("N", 16),
    ),
)
TORCH_TRITON = Backend(
    name="torch-triton",
    about="the same, its input rounded in one pass",
    run=triton_then_torch,
    run_scaled=gemm.torch_scaled,
    needs=(*TORCH.needs, Package("triton")),
)
TRITON_W8A8 = Backend(
    name="triton-w8a8",
    about="FP8 by FP8 by a kernel of ours, scales and bias in the epilogue",
    run=triton_w8a8,
    run_scaled=triton_w8a8_scaled,
    needs=(
        OnDevice("cuda"),
        Capability(8, 9),
        RoundsInput("e4m3fn"),
        Formats((E4M3FN,)),
        ONE_SCALE_A_ROW,
        ComputeDtype(HALVES),
        Package("triton"),
    ),
)
TRITON_W8A16 = Backend(
    name="triton-w8a16",
    about="codes become 16 bits inside the product",
    run=triton_w8a16,
    needs=(OnDevice("cuda"), Capability(7, 5), ONE_SCALE_A_ROW, ComputeDtype(HALVES), Package("triton")),
)
TORCH_INT8 = Backend(
    name="torch-int8",
    about="weight remade as INT8, input rounded to INT8 by row, torch._int_mm",
    run=int8.int_mm_matmul,
    run_scaled=int8.int_mm_scaled,
    twin=int8.int8_twin,
    needs=(
        OnDevice("cuda"),
        Capability(8, 0),
        ComputeDtype(FLOATS),
        RoundsInput("int8"),
        ONE_SCALE_A_ROW,
        DivisibleBy("K", 8),
        DivisibleBy("N", 8),
    ),
)
TORCH_INT8_TRITON = Backend(
    name="torch-int8-triton",
    about="the same, its input rounded in one pass",
    run=triton_then_int_mm,
    run_scaled=int8.int_mm_scaled,
    twin=int8.int8_twin,
    needs=(*TORCH_INT8.needs, Package("triton")),
)
TRITON_INT8 = Backend(
    name="triton-int8",
    about="INT8 by INT8, scales and bias in the epilogue",
    run=triton_int8,
    run_scaled=triton_int8_scaled,
    twin=int8.int8_twin,
    needs=(
        OnDevice("cuda"),
        Capability(8, 0),
        ComputeDtype(FLOATS),
        RoundsInput("int8"),
        ONE_SCALE_A_ROW,
        Package("triton"),
    ),
)

# Those behind `plain` are taken only where they are measured to be faster than all before them.
BACKENDS: Sequence[Backend] = (
    CPU_INT8, CPU_BF16, CPU, CPU_BLAS, TORCH, PLAIN, TORCH_TRITON, TRITON_W8A8, TRITON_W8A16,
    TORCH_INT8, TORCH_INT8_TRITON, TRITON_INT8, PLAIN_W8A8, PLAIN_WIDE,
)  # fmt: skip
