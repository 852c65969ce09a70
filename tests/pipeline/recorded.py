"""The tiny model of ComfyUI's recorded runs, and what they were given."""

import json
from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.models import MMDiT, MMDiTConfig
from octavo.models.vae import from_latents, to_latents
from octavo.pipeline.conditions import Condition
from octavo.pipeline.denoise import Track
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.run import Inpaint, Run, Watch, inpaint_noise, solve
from octavo.sampling import ClassifierFree, Guidance, SkipLayerGuidance, get_sampler, initial_noise, schedule
from octavo.sampling.flow import add_noise, remove_signal_scale
from tests.goldens import golden
from tests.recipes import mmdit_weights

SHIFT = 3.0
SHAPE = (1, 16, 8, 8)


@cache
def tiny_mmdit() -> MMDiT:
    """The network; the same object each time, so leave its weights alone."""
    description = golden("comfyui/mmdit_large_tiny.json")
    facts = json.loads(description.read_text())
    config = MMDiTConfig(
        depth=facts["depth"], width=facts["hidden"], heads=facts["heads"], pos_embed_size=facts["pos_embed_max_size"]
    )
    mmdit = MMDiT(config)
    mmdit.load_state_dict(mmdit_weights(description))
    return mmdit


@cache
def recorded() -> dict[str, Tensor]:
    """Inputs and outputs of the runs, by `in/…` and `out/…`."""
    return load_file(golden("comfyui/pipeline.safetensors"))


def told(name: str) -> Conditioning:
    """One of the recording's prompts: pos, neg, pos2."""
    return Conditioning(recorded()[f"in/{name}"], recorded()[f"in/{name}_pooled"])


def cfg(scale: float, *, rescale: float = 0.0, skip: SkipLayerGuidance | None = None) -> Guidance:
    """Guidance as nodes set it."""
    return Guidance(classifier_free=ClassifierFree(scale=scale, rescale=rescale), skip_layers=skip)


def sides(*positive: Condition, scale: float = 4.5) -> Track:
    """These conditions against the recording's negative prompt."""
    return Track(positive=positive, negative=[Condition(conditioning=told("neg"))], guidance=cfg(scale), shift=SHIFT)


def plain(scale: float = 4.5) -> Track:
    """The recording's default."""
    return sides(Condition(conditioning=told("pos")), scale=scale)


def levels(steps: int, *, sampler: str = "euler", denoise: float = 1.0, name: str = "sgm_uniform") -> list[float]:
    """As KSampler takes them."""
    return schedule(name, steps, SHIFT, denoise, get_sampler(sampler).discard_penultimate)


def latents(
    track: Track,
    sigmas: list[float],
    *,
    seed: int = 1,
    sampler: str = "euler",
    start: Tensor | None = None,
    mask: Tensor | None = None,
    noisy: bool = True,
    watch: Watch = lambda _step: None,
) -> Tensor:
    """What ComfyUI calls the run's LATENT.

    Args:
        start: a LATENT; all of it 0 when not given.
        mask: [1, 1, h, w], 1 = draw anew.
        noisy: whether noise is put over the start.
    """
    spec = get_sampler(sampler)
    noise = initial_noise(SHAPE, seed) if noisy else torch.zeros(SHAPE)
    first = torch.zeros(SHAPE) if start is None else to_latents(start)
    inpaint = None if mask is None else Inpaint(mask=mask, latents=first, noise=inpaint_noise(spec, noise, seed))
    x = add_noise(first, noise, sigmas[0])
    run = Run(mmdit=tiny_mmdit, track=track, sampler=spec, sigmas=sigmas, x=x, seed=seed, inpaint=inpaint)
    return from_latents(remove_signal_scale(solve(run, watch), sigmas[-1]))
