"""Backends that round the input too equal the definition on the rounded input."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.fp8 import E4M3FN, E5M2, Granularity, Scaled, dequantize
from octavo.fp8.backends import ScaledMatmul
from octavo.fp8.gemm import torch_matmul
from octavo.fp8.int8 import dequantize_int8, int8_twin, int_mm_matmul, quantize_int8
from octavo.fp8.matmul import CPU_INT8, plain_w8a8
from tests.fp8.weights import every_finite_code, nearest_e4m3fn, w8a8, weight

VNNI = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor lacks VNNI")
GRANULARITIES = pytest.mark.parametrize("granularity", ["tensor", "row"])
SHAPES = [(1, 16, 16), (5, 48, 32), (30, 336, 160)]  # M, K, N


def inputs(M: int, K: int) -> Tensor:
    """Rows of very different sizes, one of them nothing but zeros."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, M)[:, None]
    x[M // 2] = 0
    return x


def test_int8_rounds_to_nearest_by_row() -> None:
    x = inputs(9, 64)
    rounded = quantize_int8(x)
    assert ((dequantize_int8(rounded) - x).abs() <= rounded.scale / 2 * (1 + 1e-5)).all()
    assert torch.equal(rounded.q.abs().amax(1), torch.where(x.abs().amax(1) > 0, 127, 0).to(torch.int8))


@GRANULARITIES
def test_the_int8_twin_is_the_weight_rounded_by_row_whatever_the_block(granularity: Granularity) -> None:
    scaled = weight(600, 20, granularity=granularity)  # more rows than are remade at once
    twin = int8_twin(scaled)
    whole = quantize_int8(dequantize(scaled))
    assert torch.equal(twin.q, whole.q)
    assert torch.equal(twin.scale, whole.scale)
    assert twin.q.nbytes == scaled.q.nbytes


@pytest.mark.parametrize("kernel", [pytest.param("onednn", marks=VNNI), "int_mm"])
@GRANULARITIES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_products_are_exact(
    kernel: str, granularity: Granularity, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Sums of INT8 products are whole numbers below 2²⁴ here, so only the scales and the bias round."""
    M, K, N = shape
    assert K * 127 * 127 < 2**24
    x, scaled, bias = inputs(M, K).to(dtype), weight(N, K, granularity=granularity), torch.linspace(-1, 1, N)
    twin = int8_twin(scaled)
    expected = F.linear(dequantize_int8(quantize_int8(x)).double(), dequantize_int8(twin).double(), bias.double())
    if kernel == "onednn":
        assert CPU_INT8.twin is not None
        y = CPU_INT8.run(x, CPU_INT8.twin(scaled), bias, None)
    else:
        y = int_mm_matmul(x, twin, bias, None)
    assert y.dtype == dtype
    size = F.linear(dequantize_int8(quantize_int8(x)).abs(), dequantize_int8(twin).abs(), bias.abs())
    steps = 6 * 2**-24 + (2**-8 if dtype == torch.bfloat16 else 0)
    assert ((y.double() - expected).abs() <= steps * size).all()


@VNNI
def test_int8_holds_the_largest_products() -> None:
    """Where a processor adds pairs in 16 bits, these sums would be cut off."""
    x = torch.full((3, 64), 5.0)
    scaled = Scaled(torch.full((16, 64), 448.0).to(E4M3FN.dtype), torch.tensor(1.0))
    assert CPU_INT8.twin is not None
    y = CPU_INT8.run(x, CPU_INT8.twin(scaled), None, None)
    assert torch.allclose(y, torch.full((3, 16), 5.0 * 448 * 64))


@GRANULARITIES
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("run", [plain_w8a8, torch_matmul], ids=lambda f: f.__name__)
def test_fp8_by_fp8_rounds_the_input_by_its_calibrated_scale_or_else_by_row(
    run: ScaledMatmul, granularity: Granularity, calibrated: bool, shape: tuple[int, int, int]
) -> None:
    """On a CPU torch has the same operator as on a GPU, so its scales, transposes and bias are proven here."""
    M, K, N = shape
    x, scaled, bias = inputs(M, K), weight(N, K, granularity=granularity), torch.linspace(-1, 1, N)
    input_scale = torch.tensor(0.7) if calibrated else None  # clamps the largest rows
    expected, size = w8a8(x, scaled, bias, input_scale)
    assert ((run(x, scaled, bias, input_scale) - expected).abs() <= (K + 4) * 2**-24 * size).all()


def test_the_oracle_knows_every_number_and_every_tie() -> None:
    numbers = every_finite_code(1, 254, E4M3FN).double()
    assert torch.equal(nearest_e4m3fn(numbers), numbers)
    ties = torch.tensor([1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10, 500.0, -1.0625])
    assert nearest_e4m3fn(ties).tolist() == [1.0, 1.25, 0.0, 2.0**-8, 448.0, -1.0]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_definition_takes_16_bits_and_rounds_once(calibrated: bool, dtype: torch.dtype) -> None:
    x, scaled = (inputs(5, 48) / 100).to(dtype), weight(32, 48, E5M2, "row")
    scaled.scale.mul_(2**-10)
    input_scale = torch.tensor(0.01) if calibrated else None
    y = plain_w8a8(x, scaled, None, input_scale)
    assert y.dtype == dtype
    assert torch.equal(y, plain_w8a8(x.float(), scaled, None, input_scale).to(dtype))


@pytest.mark.parametrize("run", [plain_w8a8, torch_matmul, int_mm_matmul], ids=lambda f: f.__name__)
def test_no_rows_give_no_rows(run: object) -> None:
    scaled = weight(16, 16)
    twin = int8_twin(scaled) if run is int_mm_matmul else scaled
    assert run(torch.empty(0, 16), twin, None, None).shape == (0, 16)  # type: ignore[operator]
