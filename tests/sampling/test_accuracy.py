"""How far samplers are from the exact answer, and how that falls with the number of steps. See `flows`."""

import math

import pytest
import torch

from octavo.errors import NumericsError
from octavo.sampling import SAMPLERS, SamplerSpec, sample
from tests.sampling.flows import denoise, denoise_guided, deviation, geometric, result_deviation

# Multistep samplers make a first step of order 1, whose error is of the size of a whole run of order 2.
ORDERS = {
    "euler": 1,
    "euler_cfg_pp": 1,
    "ddim": 1,
    "heunpp2": 1,  # its weights follow sigma, not the step
    "gradient_estimation": 1,  # gamma 2 goes beyond the second-order 1.5
    "gradient_estimation_cfg_pp": 1,
    "heun": 2,
    "dpm_2": 2,
    "exp_heun_2_x0": 2,
    "lms": 2,
    "ipndm": 2,
    "ipndm_v": 2,
    "deis": 2,
    "dpmpp_2m": 2,
    "dpmpp_2m_cfg_pp": 2,
    "res_multistep": 2,
    "res_multistep_cfg_pp": 2,
    "uni_pc": 2,
    "uni_pc_bh2": 2,
}
# Stochastic samplers with their noise turned off solve the same equation.
ORDERS_WITHOUT_NOISE = {
    "euler_ancestral": 1,
    "euler_ancestral_cfg_pp": 1,
    "dpm_2_ancestral": 2,
    "dpmpp_2s_ancestral": 2,
    "dpmpp_sde": 2,
    "dpmpp_2m_sde": 2,
    "dpmpp_2m_sde_heun": 2,
    "dpmpp_3m_sde": 2,
    "res_multistep_ancestral": 2,
    "res_multistep_ancestral_cfg_pp": 2,
    "seeds_2": 2,
    "exp_heun_2_x0_sde": 2,
    "seeds_3": 3,
    "sa_solver": 3,
    "sa_solver_pece": 3,
}
OTHERS = {
    "dpm_fast": "the kind of its last steps depends on their number; see the test below",
    "dpm_adaptive": "chooses its own steps; see the test below",
    "ddpm": "made for data that keep their size; see the test below",
    "lcm": "for distilled models, whose estimate is a jump to the end",
    "er_sde": "its own law has no form without noise; see the test below",
    "dpmpp_2s_ancestral_cfg_pp": "does not converge, see its docstring",
}


def error(spec: SamplerSpec, steps: int) -> float:
    """From 0.9 down to 0.1, to stay off the levels where lambda is infinite."""
    start, end = 0.9, 0.1
    noise = torch.tensor([1.0, -2.0], dtype=torch.float64)
    silence = torch.zeros((), dtype=torch.float64)
    run = spec(deviation(start) * noise, geometric(start, end, steps), noise=lambda *_: silence)
    result = sample(run, denoise_guided if spec.needs_uncond else denoise)
    return (result - deviation(end) * noise).abs().max().item()


def test_every_sampler_has_an_order_or_a_reason_for_none() -> None:
    of_one_algorithm = {name for name in SAMPLERS if name.endswith("_gpu")}
    assert set(ORDERS) | set(ORDERS_WITHOUT_NOISE) | set(OTHERS) | of_one_algorithm == set(SAMPLERS)


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_error_falls_as_the_step_to_the_power_of_the_order(name: str, order: int) -> None:
    spec = SAMPLERS[name]
    assert math.log2(error(spec, 128) / error(spec, 256)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("name", "order"), ORDERS_WITHOUT_NOISE.items())
def test_without_noise_stochastic_samplers_have_an_order_too(name: str, order: int) -> None:
    spec = SAMPLERS[name].with_options(eta=0.0)
    assert math.log2(error(spec, 128) / error(spec, 256)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("lms", 2), ("ipndm", 2), ("deis", 2)])
def test_the_order_holds_from_pure_noise_to_clean_data(name: str, order: int) -> None:
    def whole_run_error(steps: int) -> float:
        x = torch.tensor([1.0, -2.0], dtype=torch.float64)
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        return (sample(SAMPLERS[name](x, sigmas), denoise) - 0.5 * x).abs().max().item()

    assert math.log2(whole_run_error(64) / whole_run_error(128)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("remainder", "order"), [(0, 2), (1, 2), (2, 3)])
def test_dpm_fast_has_the_order_of_its_lowest_step_and_one(remainder: int, order: int) -> None:
    """Third-order steps, and 2 + 1, 1 or 2 model calls left for the last ones: one step adds its local error."""
    spec = SAMPLERS["dpm_fast"]
    assert math.log2(error(spec, 96 + remainder) / error(spec, 192 + remainder)) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("tolerance", [0.05, 0.005, 0.0005, 0.00005])
def test_dpm_adaptive_is_as_exact_as_its_tolerance(tolerance: float) -> None:
    spec = SAMPLERS["dpm_adaptive"].with_options(relative_tolerance=tolerance, absolute_tolerance=tolerance / 6)
    assert error(spec, 10) < tolerance


def test_dpm_adaptive_stops_at_answers_that_are_not_numbers() -> None:
    run = SAMPLERS["dpm_adaptive"](torch.ones(3), [1.0, 0.5, 0.0])
    with pytest.raises(NumericsError, match="NaN"):
        sample(run, lambda x, _: x * math.nan)


KEEPS_THE_DEVIATION = {
    "euler_ancestral": 1,
    "euler_ancestral_cfg_pp": 1,
    "dpm_2_ancestral": 2,
    "dpmpp_2s_ancestral": 2,
    "dpmpp_sde": 2,
    "dpmpp_2m_sde": 2,
    "dpmpp_2m_sde_heun": 2,
    "dpmpp_3m_sde": 2,
    "exp_heun_2_x0_sde": 2,
    "seeds_2": 2,
    "seeds_3": 2,
    "sa_solver": 2,
    "sa_solver_pece": 2,
    "er_sde": 2,
}


@pytest.mark.parametrize(("name", "order"), KEEPS_THE_DEVIATION.items())
def test_noise_drawn_on_the_way_leaves_the_distribution_as_it_is(name: str, order: int) -> None:
    """The right amount of noise is put back, up to an error that falls with the step."""
    start, end = 0.95, 0.02

    def excess(steps: int) -> float:
        return abs(result_deviation(SAMPLERS[name], geometric(start, end, steps)) / deviation(end) - 1)

    assert excess(100) < 0.03
    assert math.log2(excess(50) / excess(100)) > order - 0.6


def test_er_sde_as_an_ode_of_order_1_has_that_order() -> None:
    spec = SAMPLERS["er_sde"].with_options(law="reverse", eta=0.0, order=1)
    assert math.log2(error(spec, 128) / error(spec, 256)) == pytest.approx(1, abs=0.15)


def test_er_sde_of_order_3_gains_by_earlier_answers() -> None:
    """By less than its order says, for its integrals are sums of 200 points."""
    spec = SAMPLERS["er_sde"].with_options(law="reverse", eta=0.0)
    assert error(spec, 64) < 0.1 * error(spec.with_options(order=1), 64)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_the_reverse_sde_of_er_sde_leaves_the_distribution_as_it_is(eta: float) -> None:
    start, end = 0.95, 0.02
    spec = SAMPLERS["er_sde"].with_options(law="reverse", eta=eta)
    assert result_deviation(spec, geometric(start, end, 200)) == pytest.approx(deviation(end), rel=3e-3)


def test_the_first_step_of_the_reverse_sde_is_that_of_dpmpp_2m_sde() -> None:
    """Both keep (n_next / n)**(1 + eta) of the old noise while the estimate stays as it is; eta 1 in both."""
    x, drawn = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)
    runs = (SAMPLERS["er_sde"].with_options(law="reverse"), SAMPLERS["dpmpp_2m_sde"])
    one, other = (sample(spec(x, [0.8, 0.5], noise=lambda *_: drawn), denoise) for spec in runs)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["ddpm", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp"])
def test_samplers_with_the_classical_noise_rule_return_too_much_variation(name: str) -> None:
    """Recorded, not wanted: these are as other programs have them, and their docstrings say so."""
    start, end = 0.95, 0.02
    assert result_deviation(SAMPLERS[name], geometric(start, end, 100)) > 1.2 * deviation(end)


@pytest.mark.parametrize(
    ("guided", "plain"),
    [
        ("euler_cfg_pp", "euler"),
        ("dpmpp_2m_cfg_pp", "dpmpp_2m"),
        ("gradient_estimation_cfg_pp", "gradient_estimation"),
        ("res_multistep_cfg_pp", "res_multistep"),
    ],
)
def test_cfg_pp_without_guidance_is_the_plain_sampler(guided: str, plain: str) -> None:
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    sigmas = [*geometric(1.0, 0.05, 9), 0.0]
    torch.testing.assert_close(
        sample(SAMPLERS[guided](x, sigmas), denoise_guided), sample(SAMPLERS[plain](x, sigmas), denoise)
    )
