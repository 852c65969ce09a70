"""Triton's kernels equal their plain definitions on odd shapes; without a GPU, in Triton's interpreter."""

import os

import pytest
import torch
import torch.nn.functional as F

from octavo.fp8 import E4M3FN, E5M2, Fp8Format, Granularity, dequantize, quantize
from octavo.fp8.int8 import dequantize_int8, int8_twin, quantize_int8
from octavo.fp8.matmul import plain_w8a8
from tests.fp8.weights import weight

pytest.importorskip("triton", reason="triton is not installed")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SHAPES = [(1, 16, 8), (17, 70, 130), (3, 129, 33)]  # M, K, N
BFLOAT16 = pytest.mark.skipif(not GPU, reason="the interpreter's tl.dot takes bfloat16 for whole numbers")

pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, and the interpreter is off"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_rounded_as_the_definition_says(dtype: torch.dtype) -> None:
    from octavo.fp8.kernels.quantize import quantize_rows

    x = torch.randn(5, 1500) * torch.logspace(-6, 4, 5)[:, None]
    x[2] = 0
    x[3, :9] = torch.arange(9) * 2.0**-10 * x[3].abs().max() / 448  # subnormal numbers and ties between them
    x = x.to(DEVICE, dtype)
    rounded, expected = quantize_rows(x), quantize(x, E4M3FN, "row")
    assert torch.allclose(rounded.scale, expected.scale, rtol=2e-7, atol=0)
    # A division may end one unit beside torch's, and then rounds to the neighbour.
    assert (rounded.q.view(torch.uint8) != expected.q.view(torch.uint8)).float().mean() < 1e-3


def test_a_given_scale_rounds_all_rows_alike() -> None:
    """Division by a power of two is exact, so codes agree to the last one."""
    from octavo.fp8.kernels.quantize import quantize_rows

    x = (torch.randn(7, 1100) * 300).to(DEVICE)  # beyond the largest number, too
    scale = torch.tensor(0.25, device=DEVICE)
    rounded = quantize_rows(x, scale)
    assert torch.equal(rounded.q.float(), quantize(x, scale=scale).q.float())
    assert rounded.scale.tolist() == [[0.25]] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_rounded_to_int8_as_the_definition_says(dtype: torch.dtype) -> None:
    from octavo.fp8.kernels.quantize import INT8, quantize_rows

    x = torch.randn(5, 1500) * torch.logspace(-6, 4, 5)[:, None]
    x[2] = 0
    x[3, 0] = 127
    x[3, 1:] = (torch.arange(1499) % 254 - 126.5).clamp(-127, 127)  # ties
    x = x.to(DEVICE, dtype)
    rounded, expected = quantize_rows(x, fmt=INT8), quantize_int8(x)
    assert torch.allclose(rounded.scale, expected.scale, rtol=2e-7, atol=0)
    assert torch.equal(rounded.q[2:4], expected.q[2:4])
    assert (rounded.q != expected.q).float().mean() < 1e-3  # where a division ends one unit beside torch's


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_by_int8_equals_the_definition_on_the_rounded_input(
    bias: bool, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Sums of products are whole numbers below 2²⁴ here, so only the scales, the bias and the result round."""
    from octavo.fp8.kernels.matmul import int8
    from octavo.fp8.kernels.quantize import INT8, quantize_rows

    M, K, N = shape
    assert K * 127 * 127 < 2**24
    x = (torch.randn(M, K) * torch.logspace(-2, 2, M)[:, None]).to(DEVICE, dtype)
    scaled = weight(N, K, granularity="row")
    twin = int8_twin(type(scaled)(scaled.q.to(DEVICE), scaled.scale.to(DEVICE)))
    b = torch.linspace(-1, 1, N, device=DEVICE) if bias else None
    rounded, w = dequantize_int8(quantize_rows(x, fmt=INT8)).double(), dequantize_int8(twin).double()
    expected = F.linear(rounded, w, None if b is None else b.double())
    size = F.linear(rounded.abs(), w.abs(), None if b is None else b.abs().double())
    y = int8(x, twin, b)
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= size * (6 * 2**-24 + (2**-11 if dtype == torch.float16 else 0))).all()


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_by_fp8_equals_the_definition(
    granularity: Granularity, calibrated: bool, bias: bool, shape: tuple[int, int, int]
) -> None:
    """Codes may differ where a division ends one unit beside torch's, so the kernel's own rounding is multiplied."""
    from octavo.fp8.kernels.matmul import w8a8
    from octavo.fp8.kernels.quantize import quantize_rows

    M, K, N = shape
    x = torch.randn(M, K).to(DEVICE, torch.float16)
    scaled = weight(N, K, granularity=granularity)
    scaled = type(scaled)(scaled.q.to(DEVICE), scaled.scale.to(DEVICE))
    b = torch.linspace(-1, 1, N, device=DEVICE) if bias else None
    input_scale = torch.tensor(2.0**-8, device=DEVICE) if calibrated else None  # clamps numbers above 1.75
    rounded, w = dequantize(quantize_rows(x, input_scale)), dequantize(scaled)
    size = F.linear(rounded.abs(), w.abs(), None if b is None else b.abs())
    bound = size * (2**-11 + (K + 3) * 2**-23)
    y = w8a8(x, scaled, b, input_scale).float()
    assert ((y - F.linear(rounded, w, b)).abs() <= bound).all()
    if calibrated:
        assert ((y - plain_w8a8(x.float(), scaled, b, input_scale)).abs() <= bound).all()


@pytest.mark.parametrize("fmt", [E4M3FN, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=BFLOAT16), torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_by_16_bits_equals_the_definition(
    fmt: Fp8Format, granularity: Granularity, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """The weight's codes are exact in 16 bits, so only the sums and the result round."""
    from octavo.fp8.kernels.matmul import w8a16

    M, K, N = shape
    x = (torch.randn(M, K) / 64).to(DEVICE, dtype)
    scaled = weight(N, K, fmt, granularity)
    scaled = type(scaled)(scaled.q.to(DEVICE), scaled.scale.to(DEVICE) * 2**-6)
    b = torch.linspace(-1, 1, N, device=DEVICE)
    w = dequantize(scaled)
    size = F.linear(x.float().abs(), w.abs(), b.abs())
    error = (w8a16(x, scaled, b).float() - F.linear(x.float(), w, b)).abs()
    assert (error <= size * ((2**-8 if dtype == torch.bfloat16 else 2**-11) + (K + 3) * 2**-23)).all()


def test_strided_and_empty_inputs_are_taken() -> None:
    from octavo.fp8.kernels.matmul import w8a16

    scaled = weight(8, 32)
    scaled = type(scaled)(scaled.q.to(DEVICE), scaled.scale.to(DEVICE))
    wide = torch.randn(3, 64).to(DEVICE, torch.float16)
    assert torch.equal(w8a16(wide[:, :32], scaled, None), w8a16(wide[:, :32].contiguous(), scaled, None))
    assert w8a16(wide[:0, :32], scaled, None).shape == (0, 8)
