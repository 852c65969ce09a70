"""Metrics obey laws that can be worked out: known differences, equal sets, Gaussians in closed form."""

import math

import pytest
import torch

from octavo.errors import RequestError
from octavo.evaluate.metrics import (
    CMMD_SIGMA,
    MOST_DECIBELS,
    cmmd,
    cosine_score,
    decibels,
    fid,
    psnr,
    relative_error,
    resampled,
    spread,
    squared_error,
    ssim,
)

pytest.importorskip("torchmetrics", reason="the eval extra is not installed")


def picture(seed: int = 0, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, (3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("levels", [1, 5, 60])
def test_psnr_of_a_known_difference(levels: int) -> None:
    """Every value off by the same: PSNR = 20 log10(255 / levels)."""
    a = picture(high=190)
    assert psnr(a, a + levels) == pytest.approx(20 * math.log10(255 / levels))
    assert decibels(squared_error(a, a + levels)) == pytest.approx(psnr(a, a + levels))


def test_equal_pictures_are_as_close_as_can_be() -> None:
    a = picture()
    assert psnr(a, a) == decibels(squared_error(a, a)) == MOST_DECIBELS
    assert ssim(a, a) == 1


def test_ssim_of_flat_pictures_is_its_luminance_term() -> None:
    """Without variance SSIM is (2ab + c) / (a² + b² + c), c = 0.01² (Wang et al. 2004)."""
    a, b = 51 / 255, 204 / 255
    flat = [torch.full((3, 32, 32), level, dtype=torch.uint8) for level in (51, 204)]
    assert ssim(*flat) == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-4)  # in float32


def test_relative_error_is_that_of_the_part_added() -> None:
    wanted = torch.randn(4, 5)
    assert relative_error(wanted * 1.01, wanted) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) == math.inf


def test_the_score_is_the_cosine_and_never_negative() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    assert cosine_score(a, b).tolist() == pytest.approx([100, 60, 0])


def test_sets_that_are_equal_have_no_distance() -> None:
    a = torch.nn.functional.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    shuffled = a[torch.randperm(60)]
    assert fid(a, shuffled) == pytest.approx(0, abs=1e-6)
    assert cmmd(a, shuffled) == pytest.approx(0, abs=1e-9)


def test_fid_of_gaussians_is_the_closed_form() -> None:
    """Shift by m and stretch by s: |m|² + tr((s - 1)² Σ), exactly so for the moments of the samples."""
    a = torch.randn(400, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ torch.diag(
        torch.linspace(0.5, 2, 6, dtype=torch.float64)
    )
    shift = torch.linspace(-1, 1, 6, dtype=torch.float64)
    assert fid(a, a + shift) == pytest.approx(float(shift.square().sum()), rel=1e-6)
    mean = a.mean(dim=0)
    stretched = mean + 1.5 * (a - mean)
    assert fid(a, stretched) == pytest.approx(0.25 * float(torch.cov(a.T).trace()), rel=1e-6)


def test_cmmd_of_two_points_is_the_kernel_between_them() -> None:
    """k(x, x) = 1, so the distance of one point to another is 2 - 2 exp(-|x - y|² / 2σ²), times 1000."""
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert cmmd(x, y) == pytest.approx(2000 * (1 - math.exp(-2 / (2 * CMMD_SIGMA**2))))


def test_fid_of_a_single_picture_is_refused() -> None:
    with pytest.raises(RequestError, match="at least two pictures"):
        fid(torch.randn(1, 4), torch.randn(9, 4))


def test_the_spread_of_a_mean_is_its_standard_error() -> None:
    """Of N values with variance s² the bootstrapped mean has 5 and 95 % points at ±1.645 s / √N."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(2))
    low, high = spread(resampled(lambda rows: float(values[rows].mean()), 400, resamples=2000))
    half = 1.645 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.1 * half)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.1 * half)


def test_draws_are_paired_so_that_what_sets_have_in_common_cancels() -> None:
    values = torch.rand(50) + 1
    once, twice = (resampled(lambda rows, f=f: float(f * values[rows].sum()), 50, resamples=9) for f in (1, 2))
    torch.testing.assert_close(twice / once, torch.full((9,), 2.0, dtype=torch.float64))
