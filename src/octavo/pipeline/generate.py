"""Prompt to picture: the whole job, on one page. Start reading here.

Stages run in the order written; each lives in the module of the same name. Loading is in `components`, serving many
requests at once in the engine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from octavo.devices import whole_processor
from octavo.errors import NumericsError
from octavo.fp8 import all_finite
from octavo.pipeline.components import Components
from octavo.pipeline.decode import OVERLAP, TILE, decode, to_uint8
from octavo.pipeline.denoise import Question, Track, denoise_finite, make_tables
from octavo.pipeline.encode import encode
from octavo.pipeline.image import Picture, open_image
from octavo.pipeline.latents import latent_shape, latents_of
from octavo.pipeline.request import GenerateRequest, Job, resolve
from octavo.sampling import ClassifierFree, Guidance, Guided, get_sampler, sample, schedule
from octavo.sampling.flow import add_noise
from octavo.sampling.noise import for_run, initial_noise


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job is; sent before each stage and after each evaluation of the model."""

    stage: Literal["encode", "denoise", "decode"]
    picture: int  # counts from 0
    pictures: int
    step: int = 0  # evaluations done
    steps: int = 0  # evaluations in all; 0 where the sampler chooses as it goes
    denoised: Tensor | None = None  # the estimate so far [1, 16, h, w]


Watcher = Callable[[Progress], None]


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
    components: Components, request: GenerateRequest, *, watch: Watcher | None = None
) -> Iterator[Picture]:
    """`generate`, one picture at a time as they are finished.

    Each is made alone, not as one row of a batch: it then comes out the same, bit for bit, when its settings are run
    again, whatever it was made together with.
    """
    job = resolve(request, components.preset, model=components.name, max_side=components.max_side)
    watch = watch or (lambda _progress: None)
    track = prepare(components, job, watch)
    for i in range(job.batch):
        yield draw(components, replace(job, seed=job.seed + i, batch=1), track, watch, i, job.batch)


@torch.inference_mode()
@whole_processor()
def prepare(components: Components, job: Job, watch: Watcher) -> Track:
    """Words to numbers: all that the pictures of a job share."""
    watch(Progress("encode", 0, job.batch))
    device, dtype = components.device, components.dtype
    free = ClassifierFree(
        scale=job.guidance_scale, rescale=job.guidance_rescale, start=job.guidance_start, end=job.guidance_end
    )
    guidance = Guidance(classifier_free=free, skip_layers=job.skip_layer_guidance)
    negative = None
    if free.scale != 1 or get_sampler(job.sampler).needs_uncond:
        negative = encode(components.text, job.negative_prompt, clip_skip=job.clip_skip).to(device, dtype)
    positive = encode(components.text, job.prompt, clip_skip=job.clip_skip).to(device, dtype)
    components.make_room_for(components.mmdit, *components.encoders)
    return Track(positive=positive, negative=negative, guidance=guidance, shift=job.shift)


@torch.inference_mode()
@whole_processor()
def draw(components: Components, job: Job, track: Track, watch: Watcher, index: int, pictures: int) -> Picture:
    """One picture, from its first latents to its pixels."""
    # What to start from
    noise = initial_noise(latent_shape(job.width, job.height), job.seed).to(components.device)
    sampler = get_sampler(job.sampler)
    sigmas = schedule(
        job.schedule, job.steps, shift=job.shift, denoise=job.denoise, discard_penultimate=sampler.discard_penultimate
    )
    start = torch.zeros_like(noise)
    if job.image is not None:
        image = open_image(job.image)
        start = latents_of(image, components.vae(), width=job.width, height=job.height).to(noise)
    # Without a level to start from, which `denoise` 0 means, the picture stays as it is.
    x = add_noise(start, noise, sigmas[0] if sigmas else 0.0)

    # From noise to data
    mmdit = components.mmdit()
    calls = [] if sampler.adaptive else sampler.calls(sigmas, shift=job.shift)
    make_tables(mmdit, track, calls)
    watch(Progress("denoise", index, pictures, 0, len(calls)))
    done = 0

    def answer(x: Tensor, sigma: float) -> Tensor | Guided:
        nonlocal done
        question = Question(x, sigma, track, sampler.needs_uncond)
        done += 1
        guided = denoise_finite(mmdit, question, evaluation=done, retry_bf16=components.retry_bf16)
        watch(Progress("denoise", index, pictures, done, len(calls), guided.denoised))
        return guided if sampler.needs_uncond else guided.denoised

    run = sampler(x, sigmas, noise=for_run(sampler, x, sigmas, job.seed), shift=job.shift)
    latents = sample(run, answer)
    if not all_finite(latents):
        raise NumericsError(
            f"The sampler {job.sampler} gave NaN or infinity with the schedule {job.schedule}; try another of either."
        )

    # From latents to pixels
    watch(Progress("decode", index, pictures, done, done))
    components.make_room_for(components.vae, components.mmdit)
    tile = TILE if components.wants_tiles(job.width, job.height) else None
    pixels = to_uint8(decode(components.vae(), latents, tile=tile, overlap=OVERLAP))
    return Picture(Image.fromarray(pixels[0].cpu().numpy()), job.settings)
