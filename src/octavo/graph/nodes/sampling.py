"""Nodes that walk from noise to latents: KSampler and its relatives. All of them lead to `walk`."""

from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise

import torch
from PIL.Image import Image
from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes.types import Conditions, Guider, Latent, ModelLink, Noise, Sigmas, SkipLayers
from octavo.graph.spec import BOOLEAN, COMBO, FLOAT, INT, LINK, NodeSpec, node
from octavo.models.vae import from_latents, to_latents
from octavo.pipeline.denoise import Track
from octavo.pipeline.latents import CHANNELS, FACTOR, latent_mask
from octavo.pipeline.request import MAX_SEED
from octavo.pipeline.run import Inpaint, Run, Step, inpaint_noise, stretch
from octavo.pipeline.shelf import Model
from octavo.pipeline.speed import EXACT
from octavo.sampling import (
    SAMPLERS,
    SCHEDULES,
    ClassifierFree,
    Guidance,
    SamplerSpec,
    SkipLayerGuidance,
    get_sampler,
    initial_noise,
    percent_to_sigma,
    schedule,
)
from octavo.sampling.flow import add_noise, remove_signal_scale, unshift_sigma
from octavo.sampling.schedule import MOST_STEPS

LOWEST = 1e-6  # level beside 0; some samplers divide by powers of it

_MODULE = "comfy_extras.nodes_custom_sampler"
_BOTH = (("LATENT", "output"), ("LATENT", "denoised_output"))
_SEED = INT(0, min=0, max=MAX_SEED, control_after_generate=True)
_STEPS = INT(20, min=1, max=10000)
_CFG = FLOAT(8.0, min=0.0, max=100.0, step=0.1, round=0.01)

# Samplers whose steps can go up as well: one slope, or two, between neighbouring levels, and nothing drawn.
_REVERSIBLE = ("euler", "ddim", "heun")


@node(
    "KSampler",
    display_name="KSampler",
    category="sampling",
    description="From noise, or from latents with noise put over them, to latents of a picture.",
    inputs={
        "model": LINK("MODEL", tooltip="Draws."),
        "seed": INT(0, min=0, max=MAX_SEED, control_after_generate=True, tooltip="The same seed, the same picture."),
        "steps": INT(20, min=1, max=10000, tooltip="More are slower and finer."),
        "cfg": FLOAT(8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance scale; 1 means none."),
        "sampler_name": COMBO(tuple(SAMPLERS), tooltip="How each step is made."),
        "scheduler": COMBO(tuple(SCHEDULES), tooltip="Where the steps are spent."),
        "positive": LINK("CONDITIONING", tooltip="What the picture should show."),
        "negative": LINK("CONDITIONING", tooltip="What it should not."),
        "latent_image": LINK("LATENT", tooltip="What to start from; its size is the picture's."),
        "denoise": FLOAT(1.0, min=0.0, max=1.0, step=0.01, tooltip="Below 1 keeps some of the latents."),
    },
    outputs=("LATENT",),
    output_tooltips=("Latents of the picture.",),
    search_aliases=("sampler", "sample", "generate", "denoise", "diffuse", "txt2img", "img2img"),
)
def ksampler(
    context: Context,
    model: ModelLink,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditions,
    negative: Conditions,
    latent_image: Latent,
    denoise: float,
) -> tuple[Latent]:
    """The whole way, or at `denoise` below 1 its last part."""
    sampler = get_sampler(sampler_name)
    sigmas = schedule(
        scheduler, steps, shift=model.shift, denoise=denoise, discard_penultimate=sampler.discard_penultimate
    )
    guider = Guider(model=model, positive=positive, negative=negative, scale=cfg)
    return (walk(context, guider, sampler, tuple(sigmas), latent_image, Noise(seed=seed))[0],)


@node(
    "KSamplerAdvanced",
    display_name="KSampler (Advanced)",
    category="sampling",
    description="Some of the steps of a run, so that several nodes can share it.",
    inputs={
        "model": LINK("MODEL"),
        "add_noise": COMBO(("enable", "disable")),
        "noise_seed": _SEED,
        "steps": _STEPS,
        "cfg": _CFG,
        "sampler_name": COMBO(tuple(SAMPLERS)),
        "scheduler": COMBO(tuple(SCHEDULES)),
        "positive": LINK("CONDITIONING"),
        "negative": LINK("CONDITIONING"),
        "latent_image": LINK("LATENT"),
        "start_at_step": INT(0, min=0, max=10000),
        "end_at_step": INT(10000, min=0, max=10000),
        "return_with_leftover_noise": COMBO(("disable", "enable")),
    },
    outputs=("LATENT",),
)
def ksampler_advanced(
    context: Context,
    model: ModelLink,
    add_noise: str,
    noise_seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditions,
    negative: Conditions,
    latent_image: Latent,
    start_at_step: int,
    end_at_step: int,
    return_with_leftover_noise: str,
) -> tuple[Latent]:
    """The steps from `start_at_step` up to `end_at_step`; the latents as they are where there is none of them."""
    sampler = get_sampler(sampler_name)
    sigmas = stretch(
        schedule(scheduler, steps, shift=model.shift, discard_penultimate=sampler.discard_penultimate),
        start_at_step,
        end_at_step,
        to_zero=return_with_leftover_noise == "disable",
    )
    guider = Guider(model=model, positive=positive, negative=negative, scale=cfg)
    noise = Noise(seed=noise_seed, silent=add_noise == "disable")
    return (walk(context, guider, sampler, tuple(sigmas), latent_image, noise)[0],)


@node(
    "SamplerCustom",
    module=_MODULE,
    category="sampling/custom_sampling",
    description="KSampler with any sampler and any levels.",
    inputs={
        "model": LINK("MODEL"),
        "add_noise": BOOLEAN(True),
        "noise_seed": _SEED,
        "cfg": _CFG,
        "positive": LINK("CONDITIONING"),
        "negative": LINK("CONDITIONING"),
        "sampler": LINK("SAMPLER"),
        "sigmas": LINK("SIGMAS"),
        "latent_image": LINK("LATENT"),
    },
    outputs=_BOTH,
)
def sampler_custom(
    context: Context,
    model: ModelLink,
    add_noise: bool,
    noise_seed: int,
    cfg: float,
    positive: Conditions,
    negative: Conditions,
    sampler: SamplerSpec,
    sigmas: Sigmas,
    latent_image: Latent,
) -> tuple[Latent, Latent]:
    """The result, and the last estimate of the clean latents."""
    guider = Guider(model=model, positive=positive, negative=negative, scale=cfg)
    return walk(context, guider, sampler, sigmas, latent_image, Noise(seed=noise_seed, silent=not add_noise))


@node(
    "SamplerCustomAdvanced",
    module=_MODULE,
    category="sampling/custom_sampling",
    description="SamplerCustom with guidance and noise from nodes of their own.",
    inputs={
        "noise": LINK("NOISE"),
        "guider": LINK("GUIDER"),
        "sampler": LINK("SAMPLER"),
        "sigmas": LINK("SIGMAS"),
        "latent_image": LINK("LATENT"),
    },
    outputs=_BOTH,
)
def sampler_custom_advanced(
    context: Context, noise: Noise, guider: Guider, sampler: SamplerSpec, sigmas: Sigmas, latent_image: Latent
) -> tuple[Latent, Latent]:
    """The result, and the last estimate of the clean latents."""
    return walk(context, guider, sampler, sigmas, latent_image, noise)


def walk(
    context: Context, guider: Guider, sampler: SamplerSpec, sigmas: Sigmas, latent: Latent, noise: Noise
) -> tuple[Latent, Latent]:
    """From latents, with noise over them, down the levels.

    Args:
        sigmas: no level at all leaves the latents as they are.
        latent: its mask, if it has one, says what is drawn anew.

    Returns:
        What the sampler ended in, and the last estimate of the clean latents (the same where there was no step). Where
        noise is left, the former is divided by its share of data, as ComfyUI hands it on. Both keep all else that
        `latent` has.

    Raises:
        RequestError: levels that cannot be walked, latents that do not suit the model, or guidance without negative.
        WrongModelError: a text that was encoded for another model.
        NumericsError: NaN or infinity on the way.
    """
    model = guider.model.model
    samples = _sixteen_channels(latent["samples"])
    _check_size(context, guider.model, samples)
    for condition in (*guider.positive, *(guider.negative or ())):
        model.check(condition.conditioning)
    if sampler.needs_uncond and guider.negative is None:
        raise RequestError(f"The sampler {sampler.name} needs a negative conditioning: use CFGGuider.")
    if not sigmas:
        unchanged = _like(latent, samples)
        return unchanged, unchanged
    sigmas = _walkable(sigmas, sampler)

    # What to start from
    device = model.part.device
    start = (to_latents(samples) if samples.any() else samples).to(device)
    drawn = torch.zeros_like(samples)
    if not noise.silent:
        drawn = initial_noise(samples.shape, noise.seed, latent.get("batch_index"))
    drawn = drawn.to(device)
    inpaint = None
    if "noise_mask" in latent:
        hidden_under = inpaint_noise(sampler, drawn, noise.seed)
        inpaint = Inpaint(mask=_fitted(latent["noise_mask"], samples).to(device), latents=start, noise=hidden_under)
    run = Run(
        mmdit=model.part,
        track=Track(
            positive=guider.positive,
            negative=guider.negative,
            guidance=_guidance(guider),
            shift=guider.model.shift,
            adapters=guider.model.adapters,
        ),
        sampler=sampler,
        sigmas=sigmas,
        x=add_noise(start, drawn, sigmas[0]),
        seed=noise.seed,
        inpaint=inpaint,
        retry_bf16=context.shelf.settings.retry_bf16,
        speed=context.speed or EXACT,
    )

    # From noise to data
    estimate: Tensor | None = None

    def watch(step: Step) -> None:
        nonlocal estimate
        estimate = step.denoised
        if step.denoised is None:
            context.check()
            return
        context.progress(step.done, step.total, partial(_preview, context, model, step.denoised[:1]))

    result = remove_signal_scale(context.solve(run, watch), sigmas[-1])
    ended, estimated = (from_latents(x.cpu().float()) for x in (result, result if estimate is None else estimate))
    return _like(latent, ended), _like(latent, estimated)


def _sixteen_channels(samples: Tensor) -> Tensor:
    """Latents [B, 16, h, w]; zeros of any number of channels, which EmptyLatentImage gives, are widened.

    Raises:
        RequestError: of another shape, or not zero and of another number of channels.
    """
    if samples.dim() != 4 or 0 in samples.shape:
        raise RequestError(f"Latents of shape {list(samples.shape)}: need [batch, {CHANNELS}, height, width].")
    if samples.shape[1] == CHANNELS:
        return samples
    if samples.any():
        raise RequestError(
            f"The latents have {samples.shape[1]} channels, SD3.5's have {CHANNELS}: they come from the VAE of another "
            "model. Encode the picture with SD3's VAE."
        )
    return samples.new_zeros(len(samples), CHANNELS, *samples.shape[2:])


def _check_size(context: Context, model: ModelLink, samples: Tensor) -> None:
    """Refuse pictures beyond what the server draws, or beyond the model's table of positions."""
    height, width = (side * FACTOR for side in samples.shape[2:])
    if height * width > context.max_pixels:
        raise RequestError(f"{width}x{height} are more than the {context.max_pixels} pixels that are allowed here.")
    config = model.model.config
    longest = config.pos_embed_size * config.patch_size * FACTOR
    if max(height, width) > longest:
        raise RequestError(
            f"{width}x{height} is too large: '{model.model.name}' knows positions up to {longest} pixels a side."
        )


def _walkable(sigmas: Sigmas, sampler: SamplerSpec) -> Sigmas:
    """The levels without those that repeat the one before: a step that leads nowhere is not made.

    Raises:
        RequestError: levels outside of 0 to 1, such as other models have, or too many of them; levels that rise,
            where the sampler cannot go up; or noise alone at the end.
    """
    levels = tuple(sigma for sigma, _ in groupby(sigmas))
    for sigma in levels:
        if not 0 <= sigma <= 1:
            raise RequestError(
                f"sigma {sigma:g}: SD3.5's noise levels lie between 0 and 1. Set sigma_max to 1, or use BasicScheduler."
            )
        if 0 < sigma < LOWEST:
            raise RequestError(f"sigma {sigma:g} is too low to be told from 0; end at 0 or at {LOWEST:g}.")
    if len(levels) - 1 > MOST_STEPS:
        raise RequestError(f"The sigmas make {len(levels) - 1} steps; at most {MOST_STEPS} are possible.")
    rises = any(sigma < sigma_next for sigma, sigma_next in pairwise(levels))
    falls = any(sigma > sigma_next for sigma, sigma_next in pairwise(levels))
    if rises and falls:
        raise RequestError("The sigmas rise and fall: a run goes one way. Check how they were put together.")
    if rises and sampler.name not in _REVERSIBLE:
        raise RequestError(
            f"The sigmas rise, and the sampler {sampler.name} only goes down; use {', '.join(_REVERSIBLE)}, or leave "
            "out FlipSigmas."
        )
    if rises and levels[0] == 0:
        raise RequestError("The sigmas rise from 0, where no direction is known; start at 0.0001 as FlipSigmas does.")
    if levels[-1] == 1:
        raise RequestError(
            "The sigmas end at 1, which is noise alone, and no latents would be left; end at a lower level."
        )
    return levels


def _fitted(mask: Tensor, samples: Tensor) -> Tensor:
    """A noise mask [1 or B, 1, h, w] for latents: scaled, its rows repeated or cut to theirs."""
    scaled = latent_mask(mask.float(), (samples.shape[2], samples.shape[3]))
    return scaled if len(scaled) == 1 else scaled[[k % len(scaled) for k in range(len(samples))]]


def _guidance(guider: Guider) -> Guidance:
    model, skip = guider.model, None
    if model.skip_layers is not None:
        skip = _as_shifted(model.skip_layers, model.shift)
    free = ClassifierFree(scale=1.0 if guider.negative is None else guider.scale, rescale=model.rescale)
    return Guidance(classifier_free=free, skip_layers=skip)


def _as_shifted(skip: SkipLayers, shift: float) -> SkipLayerGuidance:
    """Skip-layer guidance between the levels that it was meant for, whatever shift was set after it."""
    if skip.shift == shift:
        return skip.guidance
    start, end = (
        1 - unshift_sigma(percent_to_sigma(percent, skip.shift), shift)
        for percent in (skip.guidance.start, skip.guidance.end)
    )
    return replace(skip.guidance, start=start, end=end)


def _preview(context: Context, model: Model, denoised: Tensor) -> Image:
    """A quick look at the first picture; only where its VAE decodes it, the device is needed."""

    @torch.inference_mode()
    def look() -> Image:
        return model.preview(denoised)

    return context.on_device(look) if model.embedded else look()


def _like(latent: Latent, samples: Tensor) -> Latent:
    return {**latent, "samples": samples}


NODES: tuple[NodeSpec, ...] = (ksampler, ksampler_advanced, sampler_custom, sampler_custom_advanced)
