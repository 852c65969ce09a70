"""Many questions of samplers in, the model's estimates out: the only place that calls the MMDiT.

A `Track` is what one request needs at every step: its prompts, its guidance and its table of modulation, made for the
whole run in one call. `denoise` answers the questions of any number of tracks at once; rows that can share a model
call (same latent size, same number of text tokens, same blocks) do. A single picture is the case of one track.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.models import MMDiT, Modulation
from octavo.pipeline.encode import Conditioning
from octavo.sampling import Guidance, Guided, Predictions
from octavo.sampling.flow import denoised_from_velocity, timestep
from octavo.sampling.guidance import Pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """The constant part of one request's denoising."""

    positive: Conditioning
    negative: Conditioning | None  # None where neither guidance nor the sampler needs it
    guidance: Guidance
    shift: float  # of the schedule; guidance intervals are fractions of it
    tables: dict[tuple[float, bool], Modulation] = field(default_factory=dict)  # one row by (sigma, whether negative)

    def conditioning(self, which: Pass) -> Conditioning:
        """What the model is told in this pass."""
        if which != "uncond":
            return self.positive
        assert self.negative is not None, "guidance without a negative prompt"
        return self.negative

    def skip_layers(self, which: Pass) -> tuple[int, ...]:
        """Blocks left out in this pass."""
        skip = self.guidance.skip_layers
        return skip.layers if which == "skipped" and skip is not None else ()


@dataclass(frozen=True, slots=True)
class Question:
    """What a sampler asks of the model."""

    x: Tensor  # [b, 16, h, w]
    sigma: float
    track: Track
    needs_uncond: bool = False


def make_tables(mmdit: MMDiT, track: Track, sigmas: Sequence[float]) -> None:
    """Fill the track's tables for all `sigmas` in one call of the modulation, before the first step."""
    prompts = {False: track.positive} | ({} if track.negative is None else {True: track.negative})
    keys = [(sigma, which) for which in prompts for sigma in dict.fromkeys(sigmas)]
    keys = [key for key in keys if key not in track.tables]
    if not keys:
        return
    like = track.positive.pooled
    timesteps = torch.tensor([timestep(sigma) for sigma, _ in keys], dtype=torch.float32, device=like.device)
    whole = mmdit.modulation(timesteps, torch.cat([prompts[which].pooled for _, which in keys]))
    for i, key in enumerate(keys):
        track.tables[key] = whole.rows(slice(i, i + 1))


def denoise(mmdit: MMDiT, questions: Sequence[Question]) -> list[Guided]:
    """Answer every question.

    Args:
        mmdit: gets its own dtype; the answers have that of the question's `x`.
        questions: of one or many tracks.

    Returns:
        For each question its guided estimate of the clean latents and the unguided one of the negative prompt (the
        same as guided where the negative is not evaluated), both like its `x`.
    """
    groups: dict[tuple[object, ...], list[tuple[int, Pass]]] = {}
    for i, question in enumerate(questions):
        track = question.track
        for which in track.guidance.passes(question.sigma, track.shift, needs_uncond=question.needs_uncond):
            length = track.conditioning(which).context.shape[1]
            key = (question.x.shape[1:], length, track.skip_layers(which))
            groups.setdefault(key, []).append((i, which))

    estimates: list[dict[Pass, Tensor]] = [{} for _ in questions]
    for members in groups.values():
        for (i, which), velocity in zip(members, _evaluate(mmdit, questions, members), strict=True):
            question = questions[i]
            estimates[i][which] = denoised_from_velocity(question.x, velocity, question.sigma)
    return [
        question.track.guidance.combine(question.x, question.sigma, Predictions(**estimate), question.track.shift)
        for question, estimate in zip(questions, estimates, strict=True)
    ]


def _evaluate(mmdit: MMDiT, questions: Sequence[Question], members: Sequence[tuple[int, Pass]]) -> list[Tensor]:
    """One call of the model for members of like shape: their velocities, in the dtype of their `x`."""
    latents, contexts, modulations = [], [], []
    for i, which in members:
        x, sigma, track = questions[i].x, questions[i].sigma, questions[i].track
        key = (sigma, which == "uncond")
        if key not in track.tables:  # an adaptive sampler's sigma, not known before
            make_tables(mmdit, track, [sigma])
        context = track.conditioning(which).context
        latents.append(x.to(context.dtype))
        contexts.append(context.expand(len(x), -1, -1))
        modulations.extend([track.tables[key]] * len(x))
    first, first_pass = members[0]
    velocity = mmdit(
        torch.cat(latents),
        torch.cat(contexts),
        Modulation.stack(modulations),
        skip_layers=questions[first].track.skip_layers(first_pass),
    )
    parts = velocity.split([len(questions[i].x) for i, _ in members])
    return [part.to(questions[i].x.dtype) for (i, _), part in zip(members, parts, strict=True)]
