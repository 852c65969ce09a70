"""Prompt to picture: the whole job, on one page. Start reading here.

Stages run in the order written; each lives in the module of the same name. Loading is in `components`, serving many
requests at once in the engine. With `hires` there are two passes: the second starts from what the first ended in, made
larger.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor

from octavo.devices import whole_processor
from octavo.errors import NumericsError
from octavo.fp8 import all_finite
from octavo.pipeline.components import Components
from octavo.pipeline.decode import OVERLAP, decode, decode_as_fits, encode_image, to_uint8
from octavo.pipeline.denoise import Track
from octavo.pipeline.editing import Source, source_of
from octavo.pipeline.encode import Conditioning, TextEncoders, encode_all
from octavo.pipeline.hires import Hires, enlarged
from octavo.pipeline.image import Picture
from octavo.pipeline.latents import latent_shape, latents_of, mask_of
from octavo.pipeline.passes import Counted, guidance_of, levels_of, sides_of, texts_of, work_of
from octavo.pipeline.request import GenerateRequest, Job, Lora, resolve
from octavo.pipeline.run import Inpaint, Run, Solve, Step, inpaint_noise, solve
from octavo.pipeline.sparing import sparing
from octavo.pipeline.speed import speed_called
from octavo.sampling import get_sampler
from octavo.sampling.flow import add_noise
from octavo.sampling.noise import initial_noise
from octavo.text.lora_tags import spoken


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job is; sent before each stage and after each evaluation of the model."""

    stage: Literal["encode", "denoise", "decode"]
    picture: int  # counts from 0
    pictures: int
    step: int = 0  # evaluations done, of all passes
    steps: int = 0  # evaluations in all; 0 where a sampler chooses as it goes
    denoised: Tensor | None = None  # the estimate so far [1, 16, h, w]
    forecast: int = 0  # of the evaluations done: those that did not ask the model, see `speed`


Watcher = Callable[[Progress], None]

Encode = Callable[[TextEncoders, Sequence[str], int], Sequence[Conditioning]]
"""`encode.encode_all`, or one that remembers: encoders, prompts, clip skip."""

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
    encode: Encode = encode_all,
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
        what = "a picture of {}x{} pixels".format(*job.size)
        on_device = partial(sparing, smaller=components.smaller, what=what)
    watch(Progress("encode", 0, job.batch))
    tracks = on_device(partial(prepare_each, components, job, encode=encode))
    for i in range(job.batch):
        yield draw(components, replace(job, seed=job.seed + i, batch=1), tracks, watch, i, job.batch, solve, on_device)


def draw(
    components: Components,
    job: Job,
    tracks: Sequence[Track],
    watch: Watcher,
    index: int = 0,
    pictures: int = 1,
    solve: Solve = solve,
    on_device: OnDevice = at_once,
) -> Picture:
    """One picture, from its first latents to its pixels."""

    def tell(at: Step) -> None:
        watch(Progress("denoise", index, pictures, at.done, at.total, at.denoised, at.forecast))

    counted = Counted(job, tell)
    latents = solve(on_device(partial(start, components, job.passes[0], tracks[0])), counted.step)
    for again, track in zip(job.passes[1:], tracks[1:], strict=True):
        counted.next_pass()
        larger = on_device(partial(enlarge, components, job, latents))
        latents = solve(on_device(partial(start, components, again, track, larger)), counted.step)
    done, forecast = counted.now.done, counted.now.forecast
    watch(Progress("decode", index, pictures, done, done, forecast=forecast))
    return Picture(on_device(partial(finish, components, job, latents)), job.settings)


def prepare(components: Components, job: Job, *, encode: Encode = encode_all) -> Track:
    """Words to numbers, for a job of one pass: all that its pictures share."""
    (track,) = prepare_each(components, job, encode=encode)
    return track


@torch.inference_mode()
@whole_processor()
def prepare_each(components: Components, job: Job, *, encode: Encode = encode_all) -> tuple[Track, ...]:
    """Words to numbers, for each pass of a job: all that its pictures share."""
    device, dtype, passes = components.device, components.dtype, job.passes
    work = work_of(job, tokens=components.text.positions)
    components.fit(work)
    texts, said = texts_of(job), dict[tuple[tuple[Lora, ...], str], Conditioning]()
    stacks = {loras: components.stack(loras) for loras in texts}
    for loras, words in texts.items():
        text = components.text.adapted({kind: each for kind, each in stacks[loras].items() if kind != "mmdit"})
        told = encode(text, [spoken(prompt) for prompt in words], job.clip_skip)  # in one pass: encoders may stream
        said |= {(loras, prompt): each.to(device, dtype) for prompt, each in zip(words, told, strict=True)}
    controls = [components.controls(job.controls, each.width, each.height) for each in passes]
    all_controls = [control for each in controls for control in each]
    components.fit(replace(work, tokens=max(each.context.shape[1] for each in said.values())), all_controls)
    for each, followed in zip(passes, controls, strict=True):
        for control in followed:  # while the VAE is needed anyway, or before there is anything beside it
            control.hint(latent_shape(each.width, each.height)[-2:])
    components.make_room_for(components.mmdit, *components.encoders, *([components.vae] if all_controls else []))
    return tuple(
        Track.of(
            said[each.loras, each.prompt],
            said[each.loras, each.negative_prompt] if sides_of(each) == 2 else None,
            guidance_of(each),
            each.shift,
            stacks[each.loras].get("mmdit", ()),
            followed,
        )
        for each, followed in zip(passes, controls, strict=True)
    )


@torch.inference_mode()
@whole_processor()
def start(components: Components, job: Job, track: Track, before: Tensor | None = None) -> Run:
    """What the first step starts from: noise, or a picture mixed with it.

    Args:
        job: of one pass.
        before: latents [1, 16, h, w] in place of a picture; None for the first pass.
    """
    noise = initial_noise(latent_shape(job.width, job.height), job.seed).to(components.device)
    sampler = get_sampler(job.sampler)
    sigmas = levels_of(job)
    latents, inpaint = torch.zeros_like(noise) if before is None else before.to(noise), None
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
def enlarge(components: Components, job: Job, latents: Tensor) -> Tensor:
    """From the latents of the first pass of `hires` to those that the second starts from."""
    hires, (width, height) = cast(Hires, job.hires), job.size
    if hires.of_latents:
        return enlarged(latents, hires, width, height)
    pixels = enlarged(_pixels(components, job.passes[0], latents), hires, width, height)
    larger = encode_image(components.vae(), pixels)
    components.make_room_for(components.mmdit, components.vae)
    if not all_finite(larger):
        raise NumericsError(
            "The VAE gave NaN or infinity for the first pass of hires, made larger. In float16 it can overflow: try "
            "--dtype bfloat16 or float32, or enlarge latents (--hires-method latent-bislerp)."
        )
    return larger


@torch.inference_mode()
@whole_processor()
def finish(components: Components, job: Job, latents: Tensor) -> Image.Image:
    """From latents to pixels."""
    pixels = to_uint8(_pixels(components, job.passes[-1], latents))
    components.done(components.vae)
    drawn = Image.fromarray(pixels[0].cpu().numpy())
    return drawn if job.outpaint is None else cast(Source, source_of(job)).kept(drawn)


def _pixels(components: Components, job: Job, latents: Tensor) -> Tensor:
    """What latents show [1, 3, H, W] in [-1, 1]."""
    components.make_room_for(components.vae, components.mmdit)
    # Tiles change a picture a little: under a memory plan they are the last rung, after all that leaves it as it is.
    decoded = decode_as_fits if components.at_last else decode
    return decoded(components.vae(), latents, tile=components.tile(job.width, job.height), overlap=OVERLAP)
