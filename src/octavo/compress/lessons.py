"""What a 16-bit teacher answers along its own denoising runs, kept on disk for a student to learn from.

One file a prompt: some of the questions of its run, the teacher's velocities with the prompt and with the negative
one, and the latents that the run ended in. The teacher can then leave the memory before the student comes.

P points of one prompt, C channels, h and w latent pixels, L text tokens.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from octavo.checkpoint.save import save_safetensors
from octavo.devices import whole_processor
from octavo.errors import NumericsError
from octavo.fp8 import all_finite
from octavo.models import MMDiT
from octavo.pipeline.components import Components
from octavo.pipeline.denoise import Question, Track, denoise, make_tables
from octavo.pipeline.generate import prepare
from octavo.pipeline.latents import latent_shape
from octavo.pipeline.request import Job
from octavo.sampling import Guided, get_sampler, sample, schedule
from octavo.sampling.flow import add_noise
from octavo.sampling.noise import for_run, initial_noise

PASSES = ("cond", "uncond")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a model call, and the velocity that the teacher gave there; on the CPU."""

    x: Tensor  # [1, C, h, w] float32
    sigma: float
    context: Tensor  # [1, L, context width]
    pooled: Tensor  # [1, pooled width]
    velocity: Tensor  # [1, C, h, w] float32


@dataclass(frozen=True, slots=True)
class Lesson:
    """The recorded run of one prompt."""

    path: Path

    def points(self) -> int:
        """How many of the run's questions are kept."""
        with safe_open(self.path, framework="pt") as file:
            return int(file.get_slice("x").get_shape()[0])

    def rows(self, point: int) -> list[Row]:
        """The rows of one point: with the prompt, and with the negative prompt where that guided the run."""
        with safe_open(self.path, framework="pt") as file:
            names = set(file.keys())
            shared = file.get_slice("x")[point : point + 1], float(file.get_slice("sigmas")[point])
            return [
                Row(
                    x=shared[0],
                    sigma=shared[1],
                    context=file.get_tensor(f"context.{which}"),
                    pooled=file.get_tensor(f"pooled.{which}"),
                    velocity=file.get_slice(f"velocity.{which}")[point : point + 1],
                )
                for which in PASSES
                if f"velocity.{which}" in names
            ]

    def latents(self) -> Tensor:
        """What the run ended in, [1, C, h, w] float32."""
        with safe_open(self.path, framework="pt") as file:
            latents: Tensor = file.get_tensor("latents")
            return latents


@torch.inference_mode()
@whole_processor()
def record(
    teacher: Components, jobs: Sequence[Job], folder: Path, *, points: int, watch: Callable[[int], object]
) -> list[Lesson]:
    """Let the teacher draw every job, and keep lessons; those kept before are left alone.

    Args:
        teacher: the 16-bit model with its text encoders.
        jobs: what to draw.
        folder: for the files; made if missing.
        points: kept of each run, one at random from each of so many equal stretches of it.
        watch: told, before each job, how many are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lessons = [Lesson(folder / f"{index:05}.safetensors") for index in range(len(jobs))]
    for index, (job, lesson) in enumerate(zip(jobs, lessons, strict=True)):
        watch(index)
        if not lesson.path.exists():
            track = prepare(teacher, job)
            save_safetensors(lesson.path, _lesson(teacher, job, track, points), None)
    return lessons


@torch.inference_mode()
@whole_processor()
def follow(mmdit: MMDiT, job: Job, track: Track, device: torch.device) -> tuple[list[tuple[Tensor, float]], Tensor]:
    """Run the job's sampler over `mmdit`: the (x, sigma) it asked about, and the latents [1, C, h, w] it ended in.

    Raises:
        NumericsError: the model gave NaN or infinity.
    """
    sampler = get_sampler(job.sampler)
    sigmas = schedule(job.schedule, job.steps, shift=job.shift, discard_penultimate=sampler.discard_penultimate)
    noise = initial_noise(latent_shape(job.width, job.height), job.seed).to(device)
    x = add_noise(torch.zeros_like(noise), noise, sigmas[0])
    if not sampler.adaptive:
        make_tables(mmdit, track, sampler.calls(sigmas, shift=job.shift))
    asked: list[tuple[Tensor, float]] = []

    def answer(x: Tensor, sigma: float) -> Tensor | Guided:
        asked.append((x, sigma))
        (guided,) = denoise(mmdit, [Question(x, sigma, track, sampler.needs_uncond)])
        return guided if sampler.needs_uncond else guided.denoised

    latents = sample(sampler(x, sigmas, noise=for_run(sampler, x, sigmas, job.seed), shift=job.shift), answer)
    if not all_finite(latents):
        raise NumericsError(f"The model gave NaN or infinity for '{job.prompt}'. Try --dtype float32.")
    return asked, latents


def _lesson(teacher: Components, job: Job, track: Track, points: int) -> dict[str, Tensor]:
    mmdit = teacher.mmdit()
    asked, latents = follow(mmdit, job, track, teacher.device)
    chosen = [asked[step] for step in spread_steps(len(asked), points, job.seed)]
    kept = {
        "x": torch.cat([x for x, _ in chosen]).float(),
        "sigmas": torch.tensor([sigma for _, sigma in chosen], dtype=torch.float64),
        "latents": latents.float(),
    }
    for which, side in {"cond": track.positive, "uncond": track.negative or ()}.items():
        for prompt in (condition.conditioning for condition in side):
            tables = [track.tables[prompt, sigma] for _, sigma in chosen]
            answers = [
                mmdit(x.to(prompt.context.dtype), prompt.context, table)
                for (x, _), table in zip(chosen, tables, strict=True)
            ]
            kept[f"velocity.{which}"] = torch.cat(answers).float()
            kept[f"context.{which}"], kept[f"pooled.{which}"] = prompt.context, prompt.pooled
    return kept


def spread_steps(steps: int, points: int, seed: int) -> list[int]:
    """One step at random from each of `points` equal stretches of `steps`; all of them where points are as many."""
    points = min(points, steps)
    draw = random.Random(f"points {seed}")
    bounds = [round(i * steps / points) for i in range(points + 1)]
    return [draw.randrange(start, stop) for start, stop in pairwise(bounds)]
