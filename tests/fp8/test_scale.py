"""Rounding into FP8 obeys the bounds that the formats' definitions give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.fp8.formats import E4M3FN, E5M2, FORMATS, Fp8Format, all_finite_codes
from octavo.fp8.scale import Granularity, Scaled, dequantize, quantize

BOTH = pytest.mark.parametrize("fmt", [E4M3FN, E5M2], ids=lambda fmt: fmt.name)


def every_code(fmt: Fp8Format) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(fmt.dtype)


@BOTH
def test_the_table_of_a_format_agrees_with_its_256_codes(fmt: Fp8Format) -> None:
    values = every_code(fmt)[:128].float()
    finite = values[torch.isfinite(values)]
    assert finite.max() == fmt.max
    assert finite[finite > 0].min() == fmt.smallest
    assert len(finite) == fmt.first_non_finite_code
    steps = finite.diff()
    assert (steps[finite[:-1] < fmt.smallest_normal] == fmt.smallest).all()
    mantissas = torch.frexp(finite[finite >= fmt.smallest_normal]).mantissa * 2 ** (fmt.mantissa_bits + 1)
    assert torch.equal(mantissas, mantissas.round())
    assert FORMATS[fmt.dtype] is fmt


@BOTH
def test_codes_that_are_not_finite_are_noticed_one_by_one(fmt: Fp8Format) -> None:
    codes = every_code(fmt)
    assert [all_finite_codes(codes[i : i + 1]) for i in range(256)] == torch.isfinite(codes.float()).tolist()


@BOTH
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_the_error_is_at_most_half_a_step(fmt: Fp8Format, granularity: Granularity) -> None:
    """Rounding to nearest: half the spacing of the numbers around the value, in units of its scale."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 64)[:, None]
    scaled = quantize(x, fmt, granularity)
    assert scaled.scale.shape == ((64, 1) if granularity == "row" else ())
    error = (dequantize(scaled) - x).abs()
    half_step = torch.maximum(x.abs() * 2.0 ** -(fmt.mantissa_bits + 1), scaled.scale * fmt.smallest / 2)
    assert (error <= half_step * (1 + 1e-6)).all()


@BOTH
@pytest.mark.parametrize("shape", [(64, 96), (5, 7), (33, 50), (1, 130)], ids=str)
@pytest.mark.parametrize("block", [(16, 32), (128, 128), (1, 5)], ids=str)
def test_by_block_the_error_is_at_most_half_a_step_of_its_own_scale(
    fmt: Fp8Format, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    """Each block, cut out and quantized alone by one scale, gives the same; those at the edges are smaller."""
    rows, columns = torch.logspace(-3, 2, shape[0]), torch.logspace(2, -2, shape[1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * rows[:, None] * columns
    scaled = quantize(x, fmt, "block", block=block)
    back = dequantize(scaled)
    assert scaled.scale.shape == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    for i in range(scaled.scale.shape[0]):
        for j in range(scaled.scale.shape[1]):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            alone = quantize(x[here], fmt, "tensor")
            assert alone.scale == scaled.scale[i, j]
            assert torch.equal(back[here], dequantize(alone))
            half_step = torch.maximum(x[here].abs() * 2.0 ** -(fmt.mantissa_bits + 1), alone.scale * fmt.smallest / 2)
            assert ((back[here] - x[here]).abs() <= half_step * (1 + 1e-6)).all()


@BOTH
def test_the_largest_value_keeps_its_place_and_nothing_overflows(fmt: Fp8Format) -> None:
    x = torch.tensor([[3.0, -7.0], [0.5, 0.25]])
    assert quantize(x, fmt).q.float().abs().max() == fmt.max
    assert torch.equal(dequantize(quantize(x, fmt, "row")).abs().amax(1), x.abs().amax(1))


@BOTH
def test_a_given_scale_that_is_too_small_clamps(fmt: Fp8Format) -> None:
    scaled = quantize(torch.tensor([1e9, -1e9, 1.0]), fmt, scale=torch.tensor(1.0))
    assert scaled.q.float().tolist() == [fmt.max, -fmt.max, 1.0]


@BOTH
@settings(deadline=None)  # a busy machine is no failure
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_whatever_is_finite_stays_finite(fmt: Fp8Format, values: list[float]) -> None:
    for granularity in ("tensor", "row", "block"):
        scaled = quantize(torch.tensor([values]), fmt, granularity)  # type: ignore[arg-type]
        assert all_finite_codes(scaled.q)
        assert (scaled.scale > 0).all()


def test_zeros_stay_zeros() -> None:
    assert torch.equal(dequantize(quantize(torch.zeros(3, 4), E4M3FN, "row")), torch.zeros(3, 4))


@BOTH
def test_dequantizing_is_exact_and_rounded_once(fmt: Fp8Format) -> None:
    q = every_code(fmt)
    q = q[torch.isfinite(q.float())]
    scale = torch.tensor(0.3)
    exact = q.double() * scale.double()
    assert torch.equal(dequantize(Scaled(q, scale)), exact.float())
    assert torch.equal(dequantize(Scaled(q, torch.tensor(2.0)), torch.bfloat16).double(), q.double() * 2)
