"""How close a student is to its teacher on prompts that it was not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from octavo.compress.lessons import Lesson, Row, follow
from octavo.devices import whole_processor
from octavo.models import MMDiT
from octavo.pipeline.components import Components
from octavo.pipeline.decode import OVERLAP, TILE, decode, to_uint8
from octavo.pipeline.denoise import Track
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.request import Job
from octavo.sampling import ClassifierFree, Guidance
from octavo.sampling.flow import timestep

MOST_DECIBELS = 100.0  # of equal pictures, whose PSNR is infinite


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Against the teacher; root mean squares relative to the teacher's."""

    velocity: float  # error at the teacher's own (x, sigma)
    latents: float  # error of what whole runs end in
    psnr: float  # dB, of the same pictures, the mean

    def __str__(self) -> str:
        return (
            f"velocity error {100 * self.velocity:.2f} %, latent error {100 * self.latents:.2f} %, "
            f"PSNR {self.psnr:.2f} dB"
        )


@torch.inference_mode()
@whole_processor()
def quality(mmdit: MMDiT, teacher: Components, lessons: Sequence[Lesson], jobs: Sequence[Job]) -> Quality:
    """Ask `mmdit` what the teacher was asked, and let it draw what the teacher drew.

    Args:
        mmdit: on its device, in its dtype.
        teacher: whose VAE decodes both models' latents.
        lessons: of prompts kept from training.
        jobs: their jobs.
    """
    device = mmdit.pos_embed.device
    velocity, latents, decibels = _Sums(), _Sums(), []
    for lesson, job in zip(lessons, jobs, strict=True):
        for point in range(lesson.points()):
            for rows in in_calls(lesson.rows(point)):
                velocity.add(velocities(mmdit, rows), torch.cat([row.velocity for row in rows]).to(device))
        ends = follow(mmdit, job, _track(lesson, job, device), device)[1]
        wanted = lesson.latents().to(device)
        latents.add(ends, wanted)
        tile = TILE if teacher.wants_tiles(job.width, job.height) else None
        a, b = (to_uint8(decode(teacher.vae(), each, tile=tile, overlap=OVERLAP)) for each in (ends, wanted))
        decibels.append(_psnr(a.float(), b.float()))
    return Quality(velocity=velocity.relative, latents=latents.relative, psnr=sum(decibels) / len(decibels))


def in_calls(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that can share a model call: of one latent size and as many text tokens."""
    calls: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        calls.setdefault((row.x.shape, row.context.shape), []).append(row)
    return list(calls.values())


def velocities(mmdit: MMDiT, rows: Sequence[Row], *, keep: bool = True) -> Tensor:
    """What `mmdit` answers to `rows`, [len(rows), C, h, w] float32; a gradient may pass.

    Args:
        rows: of one size, see `in_calls`.
        keep: what the blocks compute, for the way back; else they are run twice, which takes a third more time and
            no memory that grows with their number.
    """
    device = mmdit.pos_embed.device
    context = torch.cat([row.context for row in rows]).to(device)
    times = torch.tensor([timestep(row.sigma) for row in rows], dtype=torch.float32, device=device)
    modulation = mmdit.modulation(times, torch.cat([row.pooled for row in rows]).to(device))
    latents = torch.cat([row.x for row in rows]).to(device, context.dtype)
    context, x = mmdit.embed(latents, context)
    for block, of_context, of_image in zip(mmdit.joint_blocks, modulation.context, modulation.image, strict=True):
        run = block if keep else partial(checkpoint, block, use_reentrant=False)
        context, x = run(context, x, of_context, of_image)
    return mmdit.finish(x, modulation.final, latents.shape[-2:]).float()


def _track(lesson: Lesson, job: Job, device: torch.device) -> Track:
    conditioning = [Conditioning(row.context.to(device), row.pooled.to(device)) for row in lesson.rows(0)]
    guidance = Guidance(classifier_free=ClassifierFree(scale=job.guidance_scale), skip_layers=job.skip_layer_guidance)
    negative = conditioning[1] if len(conditioning) > 1 else None
    return Track.of(conditioning[0], negative, guidance, job.shift)


def _psnr(a: Tensor, b: Tensor) -> float:
    error = (a - b).square().mean()
    return min(MOST_DECIBELS, float(10 * torch.log10(255**2 / error))) if error > 0 else MOST_DECIBELS


class _Sums:
    """Squares of differences and of what was wanted, added up."""

    def __init__(self) -> None:
        self.difference = self.wanted = 0.0

    def add(self, got: Tensor, wanted: Tensor) -> None:
        self.difference += float((got.double() - wanted.double()).square().sum())
        self.wanted += float(wanted.double().square().sum())

    @property
    def relative(self) -> float:
        return (self.difference / self.wanted) ** 0.5 if self.difference else 0.0
