"""GPTQ on FP8's grids, low-rank branches, choice of scales: laws and bounds."""

import pytest
import torch
from torch import Tensor, nn

from octavo.fp8 import E4M3FN, E5M2, FORMATS, Fp8Format, Granularity, dequantize, quantize
from octavo.fp8.scale import BLOCK
from octavo.quantize import rounding
from octavo.quantize.low_rank import low_rank_branch
from octavo.quantize.observe import InputStatistics, Observer
from octavo.quantize.recipe import InputScaleChoice
from octavo.quantize.rounding import expected_error, gptq
from octavo.quantize.scales import input_scale, input_scales, weight_scale


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    """Inputs that a quarter of their number of directions nearly explain, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, features // 4, generator=generator)
    mixed = few @ torch.randn(features // 4, features, generator=generator)
    return mixed + 0.1 * torch.randn(rows, features, generator=generator)


def weight_of(N: int, K: int, seed: int = 1) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_compensated_rounding_errs_less_on_correlated_inputs(fmt: Fp8Format, granularity: Granularity) -> None:
    x, w = correlated(2000, 96), weight_of(40, 96)
    block = (16, 40) if granularity == "block" else None
    scale = weight_scale(w, "amax", granularity, fmt, block=block or BLOCK)
    rounded = gptq(w, x.t() @ x / len(x), scale, fmt, block=block)
    plain = quantize(w, fmt, granularity, scale, block or BLOCK)
    error, plain_error = ((x @ (dequantize(s) - w).t()).norm() for s in (rounded, plain))
    assert error < 0.5 * plain_error
    assert rounded.q.dtype == fmt.dtype
    assert torch.equal(rounded.scale, scale)


def test_wide_layers_are_rounded_as_well_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = correlated(2000, 256), weight_of(40, 256)
    covariance = x.t() @ x / len(x)
    scale = weight_scale(w, "amax", "row", E4M3FN)
    errors = []
    for widest in (256, 255):
        monkeypatch.setattr(rounding, "WIDEST_IN_FLOAT64", widest)
        errors.append(float(expected_error(dequantize(gptq(w, covariance, scale, E4M3FN)) - w, covariance)))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert errors[1] < 0.5 * float(expected_error(dequantize(quantize(w, scale=scale)) - w, covariance))


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    w = weight_of(7, 150)
    scale = weight_scale(w, "amax", "row", E4M3FN)
    for covariance in (torch.eye(150), torch.diag(torch.linspace(0, 3, 150))):
        rounded = gptq(w, covariance, scale, E4M3FN)
        assert torch.equal(rounded.q.view(torch.uint8), quantize(w, scale=scale).q.view(torch.uint8))


def test_the_size_of_an_input_channel_changes_nothing() -> None:
    """Damping is relative to each channel; factors that are powers of two keep e5m2's wide grid."""
    x, w = correlated(500, 64), weight_of(16, 64)
    factors = 2.0 ** torch.randint(-4, 5, (64,), generator=torch.Generator().manual_seed(3))
    scale = torch.tensor(2.0**-12)
    plain = dequantize(gptq(w, x.t() @ x / 500, scale, E5M2))
    z = x * factors
    rescaled = dequantize(gptq(w / factors, z.t() @ z / 500, scale, E5M2))
    assert torch.equal(rescaled * factors, plain)


def test_channels_that_never_spoke_and_duplicates_do_not_stop_the_rounding() -> None:
    x, w = correlated(300, 64), weight_of(8, 64)
    x[:, 5] = 0
    x[:, 9] = x[:, 8]
    result = gptq(w, x.t() @ x / 300, weight_scale(w, "amax", "row", E4M3FN), E4M3FN)
    assert torch.isfinite(dequantize(result)).all()
    nearest = quantize(w, scale=result.scale)
    assert torch.equal(result.q[:, 5].view(torch.uint8), nearest.q[:, 5].view(torch.uint8))


def test_the_expected_error_is_the_mean_over_the_inputs_it_stands_for() -> None:
    x, d = correlated(400, 32), weight_of(6, 32)
    assert float(expected_error(d, x.t() @ x / 400)) == pytest.approx(float((x @ d.t()).pow(2).sum() / 400), rel=1e-4)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)], ids=["wide", "tall"])
def test_a_branch_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    """Eckart and Young: what is left, weighed by the inputs, are the singular values beyond the rank."""
    w, square = weight_of(*shape), torch.rand(shape[1], generator=torch.Generator().manual_seed(2)) + 0.01
    down, up = low_rank_branch(w, square, 5)
    left = torch.linalg.svdvals(w.double() * square.sqrt())[5:].norm()
    assert down.shape == (5, shape[1])
    assert up.shape == (shape[0], 5)
    assert float(((w - up @ down) * square.sqrt()).norm()) == pytest.approx(float(left), rel=1e-4)


def test_a_branch_of_full_rank_is_the_weight_and_silent_channels_do_no_harm() -> None:
    w = weight_of(60, 12)
    down, up = low_rank_branch(w, torch.ones(12), 99)
    assert torch.allclose(up @ down, w, atol=1e-6)
    silent = torch.ones(12)
    silent[3] = 0
    for factor in low_rank_branch(w, silent, 4):
        assert torch.isfinite(factor.half()).all()


@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_the_scale_of_least_error_errs_no_more_than_that_of_the_largest_value(granularity: Granularity) -> None:
    w, importance = weight_of(30, 200), torch.rand(200) ** 4
    scales = [weight_scale(w, choice, granularity, E4M3FN, importance) for choice in ("mse", "amax")]
    assert not torch.equal(*scales)
    errors = [dequantize(quantize(w, E4M3FN, granularity, scale)) - w for scale in scales]
    of_mse, of_amax = (float((error**2 @ importance).sum()) for error in errors)
    assert of_mse <= of_amax


def seen(x: Tensor, groups: list[Tensor] | None = None) -> InputStatistics:
    layer = torch.nn.Linear(x.shape[1], 1)
    groups = groups or [x]
    with Observer({"layer": layer}, {"layer": frozenset({"range", "covariance"})}, len(groups)) as observer:
        for observer.group, part in enumerate(groups):
            layer(part)
    statistics = observer.statistics("layer")
    assert statistics is not None
    return statistics


def test_statistics_are_those_of_all_rows_seen() -> None:
    x = correlated(300, 20)
    x[0, 0] = 0
    whole, parts = seen(x), seen(x, [x[:100].view(5, 20, 20), x[100:]])
    assert parts.rows == 300
    assert torch.allclose(parts.square, (x**2).mean(0), rtol=1e-5)
    assert parts.covariance is not None
    assert torch.allclose(parts.covariance, x.t() @ x / 300, rtol=1e-4, atol=1e-4)
    assert torch.equal(parts.amax, torch.stack([x[:100].abs().amax(), x[100:].abs().amax()]))
    assert int(parts.histogram.sum()) == 300 * 20 - 1  # the zero is not counted
    assert torch.equal(parts.histogram.sum(0), whole.histogram[0])


def test_a_layer_without_need_or_without_rows_has_no_statistics() -> None:
    layer = torch.nn.Linear(4, 4)
    with Observer({"a": layer, "b": torch.nn.Linear(4, 4)}, {"a": frozenset(), "b": frozenset({"range"})}) as observer:
        layer(torch.ones(1, 4))
    assert observer.statistics("a") is None
    assert observer.statistics("b") is None
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("choice", ["amax", "percentile", "mse"])
def test_a_static_scale_keeps_ordinary_inputs_in_range(choice: InputScaleChoice) -> None:
    x = torch.randn(5000, 40, generator=torch.Generator().manual_seed(0)) * 3
    scale = float(input_scale(seen(x), choice))
    error = (dequantize(quantize(x, scale=torch.tensor(scale))) - x).norm() / x.norm()
    assert error < 2**-4  # half a step of three mantissa bits, at worst
    assert scale <= 2 * float(x.abs().amax()) / 448


def test_a_static_scale_serves_the_quiet_part_of_the_schedule_too() -> None:
    """One part is 2^15 times as loud: with amax's scale the quiet one would be lost below the smallest value."""
    generator = torch.Generator().manual_seed(0)
    quiet, loud = torch.randn(2000, 16, generator=generator), 2.0**15 * torch.randn(2000, 16, generator=generator)
    statistics = seen(quiet, [quiet, loud])

    def worst(scale: Tensor) -> float:
        return max(float((dequantize(quantize(x, scale=scale)) - x).norm() / x.norm()) for x in (quiet, loud))

    assert worst(input_scale(statistics, "mse")) < 0.6 * worst(input_scale(statistics, "amax"))


def test_scales_by_step_group_serve_each_group_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    quiet, loud = torch.randn(64, 32), 1000 * torch.randn(64, 32)
    layer = nn.Linear(32, 8)
    with Observer({"a": layer}, {"a": frozenset({"range"})}, 3) as observer:
        for observer.group, x in ((0, loud), (2, quiet)):
            layer(x)
    statistics = observer.statistics("a")
    assert statistics is not None
    scales = input_scales(statistics, "amax")
    expected = [float(loud.abs().max()), float(loud.abs().max()), float(quiet.abs().max())]  # nothing came of group 1
    torch.testing.assert_close(scales * 448, torch.tensor(expected))
