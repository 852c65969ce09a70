"""Noise levels that nodes make and edit."""

import json
import math
from typing import Any

import pytest

from octavo.errors import RequestError
from octavo.graph.nodes import sigmas as nodes
from octavo.graph.nodes.types import ModelLink, Sigmas
from octavo.graph.spec import NodeSpec
from octavo.sampling import percent_to_sigma
from octavo.sampling.schedule import lowest
from tests.goldens import golden

NOWHERE: Any = None  # these nodes use nothing of their context


def model(shift: float = 3.0) -> ModelLink:
    """A model of which only the shift is looked at."""
    unseen: Any = None
    return ModelLink(model=unseen, shift=shift)


def one(spec: NodeSpec, **inputs: Any) -> Sigmas:
    outputs = spec.run(NOWHERE, **inputs)
    assert isinstance(outputs, tuple)
    (sigmas,) = outputs
    return tuple(sigmas)


def recorded(name: str) -> list[float]:
    return list(json.loads(golden("comfyui/sigmas.json").read_text())["schedules"][name])


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
@pytest.mark.parametrize(
    ("spec", "name", "more"),
    [
        (nodes.karras_scheduler, "karras", {"rho": 7.0}),
        (nodes.exponential_scheduler, "exponential", {}),
        (nodes.polyexponential_scheduler, "exponential", {"rho": 1.0}),
    ],
)
def test_between_the_models_own_ends_the_levels_are_those_of_the_schedule(
    spec: NodeSpec, name: str, more: dict[str, float], steps: int
) -> None:
    sigmas = one(spec, steps=steps, sigma_max=1.0, sigma_min=lowest(3.0), **more)
    assert sigmas == pytest.approx(recorded(f"{name}/steps{steps}/denoise1.0/plain"), abs=1e-6)


@pytest.mark.parametrize(("denoise", "steps"), [(1.0, 20), (0.6, 20), (0.6, 4)])
@pytest.mark.parametrize("name", ["simple", "normal", "beta", "linear_quadratic"])
def test_basic_scheduler_gives_the_levels_of_comfyui(name: str, denoise: float, steps: int) -> None:
    sigmas = one(nodes.basic_scheduler, model=model(), scheduler=name, steps=steps, denoise=denoise)
    assert sigmas == pytest.approx(recorded(f"{name}/steps{steps}/denoise{denoise}/plain"), abs=1e-6)


def test_basic_scheduler_follows_the_models_shift() -> None:
    sigmas = one(nodes.basic_scheduler, model=model(5.0), scheduler="simple", steps=2, denoise=1.0)
    assert sigmas == pytest.approx([1, percent_to_sigma(0.5, 5.0), 0])


def test_beta_sampling_with_the_usual_parameters_is_the_schedule_beta() -> None:
    sigmas = one(nodes.beta_sampling_scheduler, model=model(), steps=20, alpha=0.6, beta=0.6)
    assert sigmas == pytest.approx(recorded("beta/steps20/denoise1.0/plain"), abs=1e-6)


def test_beta_sampling_with_1_and_1_is_uniform_in_the_timestep() -> None:
    sigmas = one(nodes.beta_sampling_scheduler, model=model(1.0), steps=10, alpha=1.0, beta=1.0)
    assert sigmas == pytest.approx([1 - k / 10 for k in range(11)], abs=1.5e-3)  # trained levels are 1e-3 apart


def test_laplace_levels_are_quantiles_of_its_distribution() -> None:
    """Its quantile function in log sigma is mu - beta sign(q - 1/2) log(1 - 2|q - 1/2|), q falling from 1 to 0."""
    mu, beta, steps = -1.0, 0.5, 9
    sigmas = one(nodes.laplace_scheduler, steps=steps, sigma_max=1.0, sigma_min=0.01, mu=mu, beta=beta)
    assert len(sigmas) == steps
    for k, sigma in enumerate(sigmas[1:-1], start=1):
        q = 1 - k / (steps - 1)
        quantile = math.exp(mu - beta * math.copysign(1, q - 0.5) * math.log(1 - 2 * abs(q - 0.5)))
        assert sigma == pytest.approx(min(1.0, max(0.01, quantile)), rel=1e-4)
    assert sigmas[0] == 1.0
    assert sigmas[-1] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("spec", "inputs"),
    [
        (nodes.karras_scheduler, {"steps": 4, "sigma_max": 1.0, "sigma_min": 0.1, "rho": 0.0}),
        (nodes.exponential_scheduler, {"steps": 4, "sigma_max": 1.0, "sigma_min": 0.0}),
        (nodes.polyexponential_scheduler, {"steps": 4, "sigma_max": 0.0, "sigma_min": 0.1, "rho": 1.0}),
        (nodes.beta_sampling_scheduler, {"model": model(), "steps": 4, "alpha": 0.0, "beta": 0.6}),
        (nodes.laplace_scheduler, {"steps": 4, "sigma_max": 0.1, "sigma_min": 0.5, "mu": 0.0, "beta": 0.5}),
        (nodes.set_first_sigma, {"sigmas": (), "sigma": 1.0}),
        (
            nodes.extend_intermediate_sigmas,
            {"sigmas": (0.5,) * 200, "steps": 100, "start_at_sigma": -1.0, "end_at_sigma": 0.0, "spacing": "linear"},
        ),
    ],
)
def test_numbers_without_meaning_are_refused(spec: NodeSpec, inputs: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        spec.run(NOWHERE, **inputs)


LEVELS: Sigmas = (1.0, 0.75, 0.5, 0.25, 0.0)


def test_both_parts_of_split_levels_hold_the_one_between_them() -> None:
    assert nodes.split_sigmas.run(NOWHERE, sigmas=LEVELS, step=3) == (LEVELS[:4], LEVELS[3:])


@pytest.mark.parametrize(("denoise", "last_steps"), [(1.0, 4), (0.5, 2), (0.3, 1), (0.0, 0)])
def test_split_by_denoise_puts_that_share_of_the_steps_last(denoise: float, last_steps: int) -> None:
    high, low = nodes.split_sigmas_denoise.run(NOWHERE, sigmas=LEVELS, denoise=denoise)
    assert len(low) - 1 == last_steps
    assert high[:-1] + low == LEVELS


def test_no_levels_are_split_into_none() -> None:
    assert nodes.split_sigmas_denoise.run(NOWHERE, sigmas=(), denoise=0.5) == ((), ())


def test_flipped_levels_rise_and_do_not_start_at_0() -> None:
    flipped = one(nodes.flip_sigmas, sigmas=LEVELS)
    assert flipped[0] == pytest.approx(0.0001)
    assert flipped[1:] == LEVELS[::-1][1:]
    assert one(nodes.flip_sigmas, sigmas=()) == ()


def test_the_first_level_can_be_set() -> None:
    assert one(nodes.set_first_sigma, sigmas=LEVELS, sigma=0.875) == (0.875, *LEVELS[1:])


@pytest.mark.parametrize(
    ("spacing", "middle"), [("linear", 0.5), ("cosine", math.sqrt(0.5)), ("sine", 1 - math.sqrt(0.5))]
)
def test_steps_become_several_within_the_range_asked_for(spacing: str, middle: float) -> None:
    extended = one(
        nodes.extend_intermediate_sigmas,
        sigmas=LEVELS, steps=2, start_at_sigma=0.8, end_at_sigma=0.5, spacing=spacing,
    )  # fmt: skip
    between = [0.75 - 0.25 * middle, 0.5 - 0.25 * middle]
    assert extended == pytest.approx([1.0, 0.75, between[0], 0.5, between[1], 0.25, 0.0])


def test_a_start_below_0_means_from_the_top() -> None:
    inputs = {"sigmas": LEVELS, "steps": 3, "end_at_sigma": 0.0, "spacing": "linear"}
    extended = one(nodes.extend_intermediate_sigmas, start_at_sigma=-1.0, **inputs)
    assert extended == pytest.approx([1 - k / 12 for k in range(13)])


@pytest.mark.parametrize("percent", [0.0, 0.01, 0.5, 0.999, 1.0])
def test_percent_to_sigma_is_that_of_comfyui(percent: float) -> None:
    expected = json.loads(golden("comfyui/sigmas.json").read_text())["percent_to_sigma_shift3"][str(percent)]
    (sigma,) = nodes.sampling_percent_to_sigma.run(
        NOWHERE, model=model(), sampling_percent=percent, return_actual_sigma=False
    )
    assert sigma == pytest.approx(expected, abs=1e-9)


def test_the_actual_sigma_at_the_end_is_the_lowest_trained_one() -> None:
    inputs = {"model": model(), "sampling_percent": 1.0, "return_actual_sigma": True}
    (sigma,) = nodes.sampling_percent_to_sigma.run(NOWHERE, **inputs)
    levels = json.loads(golden("comfyui/sigmas.json").read_text())["all_model_sigmas_shift3"]
    assert sigma == pytest.approx(levels[0], abs=1e-9)


@pytest.mark.parametrize(("steps", "denoise", "timesteps"), [(1, 1.0, [999]), (4, 1.0, [999, 899, 799, 699]),
    (3, 0.5, [499, 399, 299]), (10, 0.2, [199, 99]), (5, 0.0, [])])  # fmt: skip
def test_turbo_levels_are_every_hundredth_timestep_shifted(steps: int, denoise: float, timesteps: list[int]) -> None:
    """Shift 3 takes t to 3t / (1 + 2t)."""
    expected = [3 * t / 1000 / (1 + 2 * t / 1000) for t in timesteps]
    sigmas = one(nodes.sd_turbo_scheduler, model=model(3.0), steps=steps, denoise=denoise)
    assert sigmas == pytest.approx((*expected, 0.0), abs=1e-6)
