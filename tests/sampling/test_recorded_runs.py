"""Every sampler against ComfyUI's: result, model calls and noise asked for, on a closed-form model."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.sampling import SAMPLERS, Guided, sample, schedule
from octavo.sampling.flow import add_noise, denoised_from_velocity, velocity
from tests.goldens import golden

# Those that ComfyUI computes with long sums in float32.
LOOSE = {"dpm_adaptive", "uni_pc", "uni_pc_bh2", "sa_solver", "sa_solver_pece", "seeds_3", "lms", "deis"}
# Those that ComfyUI lets draw noise and multiply it by 0.
SILENT = {"res_multistep", "res_multistep_cfg_pp", "dpm_fast", "dpm_adaptive"}

PATTERN = torch.sin(0.37 * torch.arange(1024, dtype=torch.float32)).reshape(1, 16, 8, 8)


def conditioned(x: Tensor, sigma: float) -> Tensor:
    return 0.9 * torch.tanh(0.7 * x * (1 - 0.5 * sigma) + 0.8 * PATTERN) + 0.1 * sigma * torch.cos(x)


def unconditioned(x: Tensor, sigma: float) -> Tensor:
    return 0.6 * torch.tanh(0.5 * x - 0.4 * PATTERN) + 0.05 * sigma


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(golden("comfyui/samplers.json").read_text())["cases"]
    return found


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(golden("comfyui/samplers.safetensors"))


def test_every_recorded_sampler_is_here_and_no_other(cases: dict[str, Any]) -> None:
    assert {case.split("/")[0] for case in cases} == set(SAMPLERS)


@pytest.mark.parametrize("case", ["a", "b"])  # 20 steps from pure noise; 8 steps from a noised picture
@pytest.mark.parametrize("name", SAMPLERS)
def test_run_equals_comfyui(cases: dict[str, Any], tensors: dict[str, Tensor], name: str, case: str) -> None:
    spec, recorded = SAMPLERS[name], cases[f"{name}/{case}"]
    stored = f"{name.removesuffix('_gpu')}/{case}"
    draws: Iterator[Tensor] = iter(tensors.get(f"{stored}/noise_draws", tensors["default_noise_draws_seed42"]))
    asked: list[float] = []
    drawn: list[tuple[float, float]] = []

    def answer(x: Tensor, sigma: float) -> Tensor | Guided:
        asked.append(sigma)
        if not spec.needs_uncond:
            return conditioned(x, sigma)
        uncond = unconditioned(x, sigma)
        return Guided(uncond + (conditioned(x, sigma) - uncond) * recorded["cfg"], uncond)

    def noise(sigma: float, sigma_next: float) -> Tensor:
        drawn.append((sigma, sigma_next))
        return next(draws)

    latents = torch.zeros_like(PATTERN) if case == "a" else tensors["latent_b"]
    x = add_noise(latents, tensors["noise"], recorded["sigmas"][0])
    result = sample(spec(x, recorded["sigmas"], noise=noise, shift=3.0), answer)

    torch.testing.assert_close(result, tensors[f"{stored}/out"], atol=2e-4 if name in LOOSE else 1e-5, rtol=0)
    assert asked == pytest.approx(recorded["model_calls_sigma"], abs=1e-6)
    if name in SILENT:
        assert not drawn
    else:
        pairs = recorded.get("noise_sigma_pairs", [])
        assert len(drawn) == len(pairs)
        assert [level for pair in drawn for level in pair] == pytest.approx(
            [level for pair in pairs for level in pair], abs=1e-6
        )


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_schedule_gives_the_recorded_sigmas(cases: dict[str, Any], name: str, case: str) -> None:
    recorded = cases[f"{name}/{case}"]
    sigmas = schedule(
        recorded["scheduler"],
        recorded["steps"],
        denoise=recorded["denoise"],
        discard_penultimate=SAMPLERS[name].discard_penultimate,
    )
    assert sigmas == recorded["sigmas"]


def test_euler_follows_diffusers() -> None:
    """Their trace is of a velocity that looks at x alone, v = 0.5 sin(3x) + x, over 8 steps at shift 3."""
    trace = load_file(golden("diffusers/flow_match_euler_trace.safetensors"))["trace"]
    visited: list[Tensor] = []

    def answer(x: Tensor, sigma: float) -> Tensor:
        visited.append(x)
        return denoised_from_velocity(x, 0.5 * torch.sin(3 * x) + x, sigma)

    end = sample(SAMPLERS["euler"](trace[0], schedule("normal", 8, shift=3.0)), answer)
    torch.testing.assert_close(torch.stack([*visited, end]), trace, atol=1e-5, rtol=0)


def test_velocity_and_denoised_are_two_views_of_one_prediction() -> None:
    x, v = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    sigma = torch.tensor([0.3, 0.9])
    torch.testing.assert_close(velocity(x, denoised_from_velocity(x, v, sigma), sigma), v, atol=1e-5, rtol=0)
