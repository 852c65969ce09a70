"""The straight line between data and noise, and the coordinates on it."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.sampling import percent_to_sigma
from octavo.sampling.flow import (
    add_noise,
    denoised_from_velocity,
    log_snr,
    off_pure_noise,
    remove_signal_scale,
    shift_sigma,
    sigma_from_log_snr,
    timestep,
    velocity,
)
from tests.goldens import golden

levels = st.floats(min_value=1e-6, max_value=1 - 1e-6)
shifts = st.floats(min_value=0.1, max_value=20)


def test_a_mixture_leads_back_to_its_data_and_its_noise() -> None:
    data, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    sigma = torch.tensor([0.25, 0.75])
    x = add_noise(data, noise, sigma)
    torch.testing.assert_close(x[1], 0.25 * data[1] + 0.75 * noise[1])
    torch.testing.assert_close(velocity(x, data, sigma), noise - data, atol=1e-5, rtol=0)
    torch.testing.assert_close(denoised_from_velocity(x, noise - data, sigma), data, atol=1e-5, rtol=0)


def test_the_ends_of_the_line_are_data_and_noise() -> None:
    data, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    assert torch.equal(add_noise(data, noise, 0.0), data)
    assert torch.equal(add_noise(data, noise, 1.0), noise)


def test_a_run_stopped_early_keeps_the_size_of_its_data() -> None:
    data = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(remove_signal_scale(add_noise(data, torch.zeros_like(data), 0.4), 0.4), data)


def test_rows_of_one_level_and_a_single_level_agree() -> None:
    data, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    assert torch.equal(add_noise(data, noise, torch.full((3,), 0.5)), add_noise(data, noise, 0.5))


@given(sigma=levels, shift=shifts)
def test_shifting_is_undone_by_the_inverse_shift(sigma: float, shift: float) -> None:
    assert shift_sigma(shift_sigma(sigma, shift), 1 / shift) == pytest.approx(sigma, rel=1e-9)


@given(shift=shifts)
def test_shifting_moves_neither_end(shift: float) -> None:
    assert shift_sigma(0.0, shift) == 0
    assert shift_sigma(1.0, shift) == pytest.approx(1)


@given(sigma=levels, shift=shifts)
def test_shifting_by_s_divides_the_signal_to_noise_ratio_by_s_squared(sigma: float, shift: float) -> None:
    assert log_snr(shift_sigma(sigma, shift)) == pytest.approx(log_snr(sigma) - math.log(shift), abs=1e-6)


@given(sigma=levels)
def test_level_and_log_snr_are_inverse(sigma: float) -> None:
    assert sigma_from_log_snr(log_snr(sigma)) == pytest.approx(sigma, rel=1e-9)


def test_log_snr_is_infinite_at_the_ends_and_survives_extremes() -> None:
    assert log_snr(0.0) == math.inf
    assert log_snr(1.0) == -math.inf
    assert sigma_from_log_snr(5000.0) == 0
    assert sigma_from_log_snr(-5000.0) == 1


def test_the_model_is_told_a_thousand_times_sigma() -> None:
    assert timestep(0.25) == 250
    assert torch.equal(timestep(torch.tensor([0.0, 1.0])), torch.tensor([0.0, 1000.0]))


def test_percent_to_sigma_equals_comfyui() -> None:
    recorded = json.loads(golden("comfyui/sigmas.json").read_text())["percent_to_sigma_shift3"]
    for percent, sigma in recorded.items():
        assert percent_to_sigma(float(percent), 3.0) == pytest.approx(sigma, abs=1e-12)


@given(second=st.floats(min_value=0, max_value=1, exclude_max=True), shift=shifts)
def test_a_first_level_of_one_gives_way_but_stays_above_the_second(second: float, shift: float) -> None:
    first, *rest = off_pure_noise([1.0, second], shift)
    assert second < first < 1 or second > 1 - 1e-15
    assert rest == [second]


def test_a_run_that_does_not_start_at_pure_noise_is_left_alone() -> None:
    assert off_pure_noise([0.9, 0.5, 0.0], 3.0) == [0.9, 0.5, 0.0]
    assert off_pure_noise([1.0], 3.0) == [1.0]
