"""Triton's kernels equal their plain definitions on odd shapes; without a GPU, in Triton's interpreter."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.fp8 import E4M3FN, E5M2, Fp8Format, Granularity, Scaled, dequantize
from octavo.fp8.backends import Backend
from octavo.fp8.int8 import dequantize_int8, int8_twin, quantize_int8
from octavo.fp8.matmul import TORCH, TORCH_INT8, TORCH_INT8_TRITON, TORCH_TRITON, plain_w8a8
from octavo.fp8.scale import quantize_input
from tests.fp8.weights import weight

pytest.importorskip("triton", reason="triton is not installed")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SHAPES = [(1, 16, 8), (17, 70, 130), (3, 129, 33)]  # M, K, N
BFLOAT16 = pytest.mark.skipif(not GPU, reason="the interpreter's tl.dot takes bfloat16 for whole numbers")

pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, and the interpreter is off"
)


WIDTHS = [1, 70, 1500, 9728]  # one part, and several of either length


def rows_of(width: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes: one of zeros, one that begins with subnormal numbers of e4m3fn and ties."""
    x = torch.randn(6, width) * torch.logspace(-6, 4, 6)[:, None]
    x[2] = 0
    x[3, :9] = (torch.arange(9) * 2.0**-10 * x[3].abs().max() / 448)[:width]
    return x.to(DEVICE, dtype)


def assert_alike(ours: Scaled, theirs: Scaled) -> None:
    """Number for number (zeros may lose their sign); on a GPU a division may end one unit beside torch's, and then
    rounds to the neighbour."""
    mine, others = ours.q.float(), theirs.q.float()
    assert ours.scale.shape == theirs.scale.shape
    if not GPU:
        assert torch.equal(mine, others)
        assert torch.equal(ours.scale, theirs.scale)
        return
    assert torch.allclose(ours.scale, theirs.scale, rtol=2e-7, atol=0)
    assert (mine != others).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_rounded_as_the_definition_says(width: int, dtype: torch.dtype) -> None:
    from octavo.fp8.kernels.quantize import quantize_rows

    x = rows_of(width, dtype)
    x = x[:5] if dtype == torch.float16 else x  # the last has numbers beyond
    assert_alike(quantize_rows(x), quantize_input(x, None))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("each", [False, True], ids=["one for all", "one a row"])
def test_given_scales_round_as_the_definition_says_and_are_handed_on(
    width: int, dtype: torch.dtype, each: bool
) -> None:
    """One number stays one number: beside a weight of one scale, torch has a faster kernel for it."""
    from octavo.fp8.kernels.quantize import quantize_rows

    x = rows_of(width, dtype)  # beyond the largest number, too
    scale = (torch.rand(6, 1) * 0.1 + 0.001 if each else torch.tensor(0.3)).to(DEVICE)
    rounded = quantize_rows(x, scale)
    assert rounded.scale is scale
    assert_alike(rounded, quantize_input(x, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_rounded_to_int8_as_the_definition_says(width: int, dtype: torch.dtype) -> None:
    from octavo.fp8.kernels.quantize import quantize_rows

    x = rows_of(width, dtype)
    x[3, 0] = 127
    x[3, 1:] = ((torch.arange(width - 1) % 254) - 126.5).clamp(-127, 127).to(DEVICE, dtype)  # ties
    assert_alike(quantize_rows(x, torch.tensor(9.0), form="int8"), quantize_int8(x))  # whose rows are their own measure


def test_strided_rows_are_rounded_where_they_lie() -> None:
    from octavo.fp8.kernels.quantize import quantize_rows

    wide = rows_of(96, torch.bfloat16)
    for x in (wide[:, 16:80], wide.t(), wide[:0]):
        assert_alike(quantize_rows(x), quantize_input(x.contiguous(), None))


@pytest.mark.parametrize("width", [16, 2432, 4096, 9728, 20000])
def test_parts_of_rows_are_whole_loads_of_lanes_and_few_at_once(width: int) -> None:
    """A processor of NVIDIA's holds 64 warps at most, and nears 228 KiB of what they read."""
    from octavo.fp8.kernels.quantize import part_of

    block, warps = part_of(width)
    assert block & (block - 1) == 0
    assert warps == max(1, block // 256)
    if width <= 9728:
        assert 64 // warps * width * 2 <= 160 << 10


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_by_int8_equals_the_definition_on_the_rounded_input(
    bias: bool, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Sums of products are whole numbers below 2²⁴ here, so only the scales, the bias and the result round."""
    from octavo.fp8.kernels.matmul import int8
    from octavo.fp8.kernels.quantize import quantize_rows

    M, K, N = shape
    assert K * 127 * 127 < 2**24
    x = (torch.randn(M, K) * torch.logspace(-2, 2, M)[:, None]).to(DEVICE, dtype)
    scaled = weight(N, K, granularity="row")
    twin = int8_twin(type(scaled)(scaled.q.to(DEVICE), scaled.scale.to(DEVICE)))
    b = torch.linspace(-1, 1, N, device=DEVICE) if bias else None
    rounded, w = dequantize_int8(quantize_rows(x, form="int8")).double(), dequantize_int8(twin).double()
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


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("ways", [(TORCH_TRITON, TORCH), (TORCH_INT8_TRITON, TORCH_INT8)], ids=lambda w: w[0].name)
def test_rounded_in_one_pass_torch_gives_the_same_product(
    granularity: Granularity, calibrated: bool, ways: tuple[Backend, Backend]
) -> None:
    """To the last bit where divisions are alike; a wrong shape of a scale would not be taken at all."""
    x, scaled = rows_of(48, torch.bfloat16), weight(32, 48, granularity=granularity)
    scaled = Scaled(scaled.q.to(DEVICE), scaled.scale.to(DEVICE))
    b = torch.linspace(-1, 1, 32, device=DEVICE, dtype=torch.bfloat16)
    input_scale = torch.tensor(0.3, device=DEVICE) if calibrated else None
    ready = scaled if ways[0].twin is None else ways[0].twin(scaled)
    ours, theirs = (way.run(x, ready, b, input_scale) for way in ways)
    assert ours.dtype == torch.bfloat16
    if GPU:
        assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 1e-2
    else:
        assert torch.equal(ours, theirs)


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
