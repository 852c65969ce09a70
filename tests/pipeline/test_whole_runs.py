"""Whole denoising runs against ComfyUI's, from the first noise to the last latents."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.models import MMDiT, MMDiTConfig
from octavo.models.vae import from_latents, to_latents
from octavo.pipeline.denoise import Question, Track, denoise, make_tables
from octavo.pipeline.encode import Conditioning
from octavo.sampling import ClassifierFree, Guidance, Guided, SkipLayerGuidance, get_sampler, sample, schedule
from octavo.sampling.flow import add_noise
from octavo.sampling.noise import for_run, initial_noise
from tests.goldens import golden
from tests.recipes import mmdit_weights


@pytest.fixture(scope="module")
def model() -> MMDiT:
    description = golden("comfyui/mmdit_large_tiny.json")
    facts = json.loads(description.read_text())
    config = MMDiTConfig(
        depth=facts["depth"], width=facts["hidden"], heads=facts["heads"], pos_embed_size=facts["pos_embed_max_size"]
    )
    mmdit = MMDiT(config)
    mmdit.load_state_dict(mmdit_weights(description))
    return mmdit


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(golden("comfyui/pipeline.safetensors"))


def conditioning(recorded: dict[str, Tensor], name: str) -> Conditioning:
    return Conditioning(recorded[f"in/{name}"], recorded[f"in/{name}_pooled"])


def cfg(scale: float, *, rescale: float = 0.0, skip: SkipLayerGuidance | None = None) -> Guidance:
    return Guidance(classifier_free=ClassifierFree(scale=scale, rescale=rescale), skip_layers=skip)


@dataclass(frozen=True, kw_only=True)
class Run:
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


def latents(model: MMDiT, recorded: dict[str, Tensor], run: Run) -> Tensor:
    """What ComfyUI calls the run's LATENT."""
    sampler = get_sampler(run.sampler)
    negative = conditioning(recorded, run.negative) if run.negative else None
    track = Track(
        positive=conditioning(recorded, run.positive), negative=negative, guidance=run.guidance, shift=run.shift
    )
    noise = initial_noise(run.shape, run.seed, batch_index=run.batch_index)
    start = to_latents(recorded["in/latent"]) if run.from_image else torch.zeros_like(noise)
    sigmas = schedule(
        run.schedule,
        run.steps,
        shift=run.shift,
        denoise=run.denoise,
        discard_penultimate=sampler.discard_penultimate,
    )
    x = add_noise(start, noise, sigmas[0] if sigmas else 0.0)
    make_tables(model, track, sampler.calls(sigmas, shift=run.shift))

    def answer(x: Tensor, sigma: float) -> Tensor | Guided:
        (guided,) = denoise(model, [Question(x, sigma, track, sampler.needs_uncond)])
        return guided if sampler.needs_uncond else guided.denoised

    steps = sampler(x, sigmas, noise=for_run(sampler, x, sigmas, run.seed), shift=run.shift)
    return from_latents(sample(steps, answer))


RUNS = {
    "txt2img": Run(),
    "batch2": Run(shape=(2, 16, 8, 8)),
    "batch_index": Run(shape=(2, 16, 8, 8), batch_index=(3, 0)),
    "empty_4_channels": Run(),
    "nonsquare_odd": Run(shape=(1, 16, 9, 13)),
    "cfg1": Run(guidance=cfg(1.0)),
    "basic_guider": Run(guidance=cfg(1.0), negative=None),
    "different_token_counts": Run(positive="pos2"),
    "img2img_denoise_0.5": Run(denoise=0.5, from_image=True),
    "euler_ancestral": Run(sampler="euler_ancestral", seed=7),
    "dpmpp_2m": Run(sampler="dpmpp_2m", steps=6),
    "dpmpp_2m_sde": Run(sampler="dpmpp_2m_sde", steps=6, seed=9),
    "uni_pc": Run(sampler="uni_pc", steps=6, schedule="simple"),
    "euler_cfg_pp": Run(sampler="euler_cfg_pp", guidance=cfg(1.5)),
    "beta8": Run(steps=8, schedule="beta"),
    "slg_scale3": Run(guidance=cfg(4.5, skip=SkipLayerGuidance(scale=3, layers=(0,), start=0, end=1))),
    "shift5": Run(shift=5.0),
    "rescale_cfg": Run(guidance=cfg(4.5, rescale=0.7)),
    "slg_range_rescale": Run(
        steps=6,
        guidance=cfg(4.5, skip=SkipLayerGuidance(scale=3, layers=(0,), start=0.01, end=0.5, rescale=0.5)),
    ),
    "denoise_0": Run(denoise=0.0, from_image=True),
    "full6": Run(steps=6),
}


@pytest.mark.parametrize("case", RUNS)
def test_latents_equal_comfyui(model: MMDiT, recorded: dict[str, Tensor], case: str) -> None:
    torch.testing.assert_close(latents(model, recorded, RUNS[case]), recorded[f"out/{case}"], atol=1e-4, rtol=0)


def test_requests_in_company_get_what_they_get_alone(model: MMDiT, recorded: dict[str, Tensor]) -> None:
    """Unlike prompts, lengths of text, guidance and noise levels in one call; only the order of sums may differ."""
    tracks = [
        Track(
            positive=conditioning(recorded, positive),
            negative=conditioning(recorded, "neg") if scale != 1 else None,
            guidance=cfg(scale, skip=skip),
            shift=3.0,
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
    together = denoise(model, questions)
    for question, answer in zip(questions, together, strict=True):
        (alone,) = denoise(model, [question])
        torch.testing.assert_close(answer.denoised, alone.denoised, atol=2e-5, rtol=1e-5)
        assert answer.denoised.shape == question.x.shape
