"""Prompt to picture: the whole job, on one page. Start reading here.

Stages run in the order written; each lives in the module of the same name. Loading is in `components`, serving many
requests at once in the engine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor

from octavo.devices import whole_processor
from octavo.pipeline.components import Components
from octavo.pipeline.decode import OVERLAP, decode, decode_as_fits, to_uint8
from octavo.pipeline.denoise import Track
from octavo.pipeline.editing import Source, source_of
from octavo.pipeline.encode import Conditioning, TextEncoders, encode
from octavo.pipeline.image import Picture
from octavo.pipeline.latents import latent_shape, latents_of, mask_of
from octavo.pipeline.request import GenerateRequest, Job, resolve
from octavo.pipeline.run import Inpaint, Run, Solve, Step, inpaint_noise, solve
from octavo.pipeline.sparing import sparing
from octavo.pipeline.speed import speed_called
from octavo.placement.work import Work
from octavo.sampling import ClassifierFree, Guidance, get_sampler, schedule
from octavo.sampling.flow import add_noise
from octavo.sampling.noise import initial_noise
from octavo.text.lora_tags import spoken


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job is; sent before each stage and after each evaluation of the model."""

    stage: Literal["encode", "denoise", "decode"]
    picture: int  # counts from 0
    pictures: int
    step: int = 0  # evaluations done
    steps: int = 0  # evaluations in all; 0 where the sampler chooses as it goes
    denoised: Tensor | None = None  # the estimate so far [1, 16, h, w]
    forecast: int = 0  # of the evaluations done: those that did not ask the model, see `speed`


Watcher = Callable[[Progress], None]

Encode = Callable[[TextEncoders, str, int], Conditioning]
"""`encode.encode`, or one that remembers: encoders, prompt, clip skip."""

OnDevice = Callable[[Callable[[], Any]], Any]
"""Does a piece of work on the device and gives its result; for those whose device belongs to another thread."""


def at_once(work: Callable[[], Any]) -> Any:
    """The plain `OnDevice`: here and now."""
    return work()


def generate(components: Components, request: GenerateRequest, *, watch: Watcher | None = None) -> list[Picture]:
    """Draw what is asked.

    Args:
        components: a loaded model, see `octavo.load`.
        request: what to draw and how.
        watch: called with the progress; an exception it raises stops the job.

    Returns:
        `request.batch` pictures; the seed counts up from one to the next.

    Raises:
        RequestError: the request does not suit the model.
        NumericsError: the model gave NaN or infinity.
    """
    return list(generate_each(components, request, watch=watch))


def generate_each(
    components: Components,
    request: GenerateRequest,
    *,
    watch: Watcher | None = None,
    solve: Solve = solve,
    encode: Encode = encode,
    on_device: OnDevice | None = None,
) -> Iterator[Picture]:
    """`generate`, one picture at a time as they are finished.

    Each is made alone, not as one row of a batch: it then comes out the same, bit for bit, when its settings are run
    again, whatever it was made together with.

    Args:
        solve: who asks the model; an engine's answers many requests at once.
        encode: who turns prompts into conditioning.
        on_device: who does the rest of the work: what comes before and after the steps; here and now, under smaller and
            smaller memory plans where memory is short, if None.
    """
    job = resolve(request, components.preset, model=components.name, max_side=components.max_side)
    watch = watch or (lambda _progress: None)
    if on_device is None:
        what = f"a picture of {job.width}x{job.height} pixels"
        on_device = partial(sparing, smaller=components.smaller, what=what)
    watch(Progress("encode", 0, job.batch))
    track = on_device(partial(prepare, components, job, encode=encode))
    for i in range(job.batch):
        yield draw(components, replace(job, seed=job.seed + i, batch=1), track, watch, i, job.batch, solve, on_device)


def draw(
    components: Components,
    job: Job,
    track: Track,
    watch: Watcher,
    index: int = 0,
    pictures: int = 1,
    solve: Solve = solve,
    on_device: OnDevice = at_once,
) -> Picture:
    """One picture, from its first latents to its pixels."""
    last = Step(0, 0)

    def step(at: Step) -> None:
        nonlocal last
        last = at
        watch(Progress("denoise", index, pictures, at.done, at.total, at.denoised, at.forecast))

    run = on_device(partial(start, components, job, track))
    latents = solve(run, step)
    watch(Progress("decode", index, pictures, last.done, last.done, forecast=last.forecast))
    return Picture(on_device(partial(finish, components, job, latents)), job.settings)


@torch.inference_mode()
@whole_processor()
def prepare(components: Components, job: Job, *, encode: Encode = encode) -> Track:
    """Words to numbers: all that the pictures of a job share."""
    device, dtype = components.device, components.dtype
    free = ClassifierFree(
        scale=job.guidance_scale, rescale=job.guidance_rescale, start=job.guidance_start, end=job.guidance_end
    )
    guidance = Guidance(classifier_free=free, skip_layers=job.skip_layer_guidance)
    sides = 2 if free.scale != 1 or get_sampler(job.sampler).needs_uncond else 1
    shortest = components.text.positions
    work = Work(width=job.width, height=job.height, steps=job.steps, rows=sides, prompts=sides, tokens=shortest)
    components.fit(work)
    stack = components.stack(job.loras)
    text = components.text.adapted({kind: applied for kind, applied in stack.items() if kind != "mmdit"})
    negative = None
    if sides == 2:
        negative = encode(text, spoken(job.negative_prompt), job.clip_skip).to(device, dtype)
    positive = encode(text, spoken(job.prompt), job.clip_skip).to(device, dtype)
    controls = components.controls(job.controls, job.width, job.height)
    tokens = max(each.context.shape[1] for each in (positive, negative) if each is not None)
    components.fit(replace(work, tokens=tokens), controls)
    for control in controls:  # while the VAE is needed anyway, or before there is anything beside it
        control.hint(latent_shape(job.width, job.height)[-2:])
    components.make_room_for(components.mmdit, *components.encoders, *([components.vae] if controls else []))
    return Track.of(positive, negative, guidance, job.shift, stack.get("mmdit", ()), controls)


@torch.inference_mode()
@whole_processor()
def start(components: Components, job: Job, track: Track) -> Run:
    """What the first step starts from: noise, or a picture mixed with it."""
    noise = initial_noise(latent_shape(job.width, job.height), job.seed).to(components.device)
    sampler = get_sampler(job.sampler)
    sigmas = schedule(
        job.schedule, job.steps, shift=job.shift, denoise=job.denoise, discard_penultimate=sampler.discard_penultimate
    )
    latents, inpaint = torch.zeros_like(noise), None
    source = source_of(job)
    if source is not None:
        latents = latents_of(source.image, components.vae(), width=job.width, height=job.height).to(noise)
        components.done(components.vae)
    if source is not None and source.mask is not None:
        mask = mask_of(source.mask, width=job.width, height=job.height).to(noise)
        inpaint = Inpaint(mask=mask, latents=latents, noise=inpaint_noise(sampler, noise, job.seed))
    return Run(
        mmdit=components.mmdit,
        track=track,
        sampler=sampler,
        sigmas=sigmas,
        # Without a level to start from, which `denoise` 0 means, the picture stays as it is.
        x=add_noise(latents, noise, sigmas[0] if sigmas else 0.0),
        seed=job.seed,
        inpaint=inpaint,
        retry_bf16=components.retry_bf16,
        speed=speed_called(job.speed),
        smaller=components.smaller,
    )


@torch.inference_mode()
@whole_processor()
def finish(components: Components, job: Job, latents: Tensor) -> Image.Image:
    """From latents to pixels."""
    components.make_room_for(components.vae, components.mmdit)
    # Tiles change a picture a little: under a memory plan they are the last rung, after all that leaves it as it is.
    decoded = decode_as_fits if components.at_last else decode
    pixels = to_uint8(decoded(components.vae(), latents, tile=components.tile(job.width, job.height), overlap=OVERLAP))
    components.done(components.vae)
    drawn = Image.fromarray(pixels[0].cpu().numpy())
    return drawn if job.outpaint is None else cast(Source, source_of(job)).kept(drawn)
