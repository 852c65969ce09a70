"""Whole denoising runs against ComfyUI's, from the first noise to the last latents."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from octavo.models.vae import from_latents, to_latents
from octavo.pipeline.denoise import Question, Track, denoise
from octavo.pipeline.run import Run, solve
from octavo.sampling import Guidance, SkipLayerGuidance, get_sampler, initial_noise, schedule
from octavo.sampling.flow import add_noise
from tests.pipeline.recorded import cfg, recorded, tiny_mmdit, told


@dataclass(frozen=True, kw_only=True)
class Case:
    """What differs from the recording's defaults."""

    seed: int = 1
    steps: int = 4
    sampler: str = "euler"
    schedule: str = "sgm_uniform"
    shift: float = 3.0
    denoise: float = 1.0
    guidance: Guidance = field(default_factory=lambda: cfg(4.5))
    positive: str = "pos"
    negative: str | None = "neg"
    shape: tuple[int, ...] = (1, 16, 8, 8)
    batch_index: tuple[int, ...] | None = None
    from_image: bool = False


def latents(case: Case) -> Tensor:
    """What ComfyUI calls the run's LATENT."""
    sampler = get_sampler(case.sampler)
    negative = told(case.negative) if case.negative else None
    track = Track.of(told(case.positive), negative, case.guidance, case.shift)
    noise = initial_noise(case.shape, case.seed, batch_index=case.batch_index)
    start = to_latents(recorded()["in/latent"]) if case.from_image else torch.zeros_like(noise)
    sigmas = schedule(
        case.schedule,
        case.steps,
        shift=case.shift,
        denoise=case.denoise,
        discard_penultimate=sampler.discard_penultimate,
    )
    x = add_noise(start, noise, sigmas[0] if sigmas else 0.0)
    run = Run(mmdit=tiny_mmdit, track=track, sampler=sampler, sigmas=sigmas, x=x, seed=case.seed)
    return from_latents(solve(run, lambda _step: None))


RUNS = {
    "txt2img": Case(),
    "batch2": Case(shape=(2, 16, 8, 8)),
    "batch_index": Case(shape=(2, 16, 8, 8), batch_index=(3, 0)),
    "empty_4_channels": Case(),
    "nonsquare_odd": Case(shape=(1, 16, 9, 13)),
    "cfg1": Case(guidance=cfg(1.0)),
    "basic_guider": Case(guidance=cfg(1.0), negative=None),
    "different_token_counts": Case(positive="pos2"),
    "img2img_denoise_0.5": Case(denoise=0.5, from_image=True),
    "euler_ancestral": Case(sampler="euler_ancestral", seed=7),
    "dpmpp_2m": Case(sampler="dpmpp_2m", steps=6),
    "dpmpp_2m_sde": Case(sampler="dpmpp_2m_sde", steps=6, seed=9),
    "uni_pc": Case(sampler="uni_pc", steps=6, schedule="simple"),
    "euler_cfg_pp": Case(sampler="euler_cfg_pp", guidance=cfg(1.5)),
    "beta8": Case(steps=8, schedule="beta"),
    "slg_scale3": Case(guidance=cfg(4.5, skip=SkipLayerGuidance(scale=3, layers=(0,), start=0, end=1))),
    "shift5": Case(shift=5.0),
    "rescale_cfg": Case(guidance=cfg(4.5, rescale=0.7)),
    "slg_range_rescale": Case(
        steps=6,
        guidance=cfg(4.5, skip=SkipLayerGuidance(scale=3, layers=(0,), start=0.01, end=0.5, rescale=0.5)),
    ),
    "denoise_0": Case(denoise=0.0, from_image=True),
    "full6": Case(steps=6),
}


@pytest.mark.parametrize("case", RUNS)
def test_latents_equal_comfyui(case: str) -> None:
    torch.testing.assert_close(latents(RUNS[case]), recorded()[f"out/{case}"], atol=1e-4, rtol=0)


def test_requests_in_company_get_what_they_get_alone() -> None:
    """Unlike prompts, lengths of text, guidance and noise levels in one call; only the order of sums may differ."""
    tracks = [
        Track.of(
            told(positive),
            told("neg") if scale != 1 else None,
            cfg(scale, skip=skip),
            3.0,
        )
        for positive, scale, skip in (
            ("pos", 4.5, None),
            ("pos2", 7.0, None),
            ("pos", 1.0, None),
            ("pos2", 3.0, SkipLayerGuidance(scale=2, layers=(1,), start=0, end=1)),
        )
    ]
    shapes = [(1, 16, 8, 8), (2, 16, 8, 8), (1, 16, 8, 8), (1, 16, 6, 10)]
    questions = [
        Question(torch.randn(shape, generator=torch.Generator().manual_seed(i)), 0.3 + 0.2 * i, track)
        for i, (shape, track) in enumerate(zip(shapes, tracks, strict=True))
    ]
    together = denoise(tiny_mmdit(), questions)
    for question, answer in zip(questions, together, strict=True):
        (alone,) = denoise(tiny_mmdit(), [question])
        torch.testing.assert_close(answer.denoised, alone.denoised, atol=2e-5, rtol=1e-5)
        assert answer.denoised.shape == question.x.shape
