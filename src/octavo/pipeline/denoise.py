"""Many questions of samplers in, the model's estimates out: the only place that calls the MMDiT.

A `Track` is what one request needs at every step: its prompts, its guidance and its table of modulation, made for the
whole run in one call. `denoise` answers the questions of any number of tracks at once; rows that can share a model
call (same latent size, same number of text tokens, same blocks) do. A single picture is the case of one track.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from octavo.errors import NumericsError
from octavo.fp8 import Choice, Fp8Linear, all_finite, watch
from octavo.fp8.matmul import PLAIN_WIDE
from octavo.models import MMDiT, Modulation
from octavo.pipeline.encode import Conditioning
from octavo.sampling import Guidance, Guided, Predictions
from octavo.sampling.flow import denoised_from_velocity, timestep
from octavo.sampling.guidance import Pass

logger = logging.getLogger(__name__)


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


def denoise_finite(mmdit: MMDiT, question: Question, *, evaluation: int, retry_bf16: bool = False) -> Guided:
    """Answer one question by finite numbers.

    Args:
        mmdit: as `denoise`.
        question: of one track, whose tables are made anew where something goes wrong.
        evaluation: its number, for messages.
        retry_bf16: let an FP8 layer that gives NaN or infinity multiply in bfloat16 (or float32) from then on, with a
            warning, and try again.

    Raises:
        NumericsError: the answer is not finite; names the layer.
    """
    (guided,) = denoise(mmdit, [question])
    while not all_finite(guided.denoised):
        question.track.tables.clear()  # so that the modulation is watched too
        with watch(mmdit) as culprit:
            denoise(mmdit, [question])
        layer = culprit.layer
        if not (retry_bf16 and isinstance(layer, Fp8Linear) and _widen(layer)):
            tried = " Retrying it in bfloat16 did not help." if _is_wide(layer) else ""
            raise NumericsError(
                f"The model gave NaN or infinity in evaluation {evaluation}. {culprit}{tried} "
                + _advice(layer, retry_bf16)
            )
        logger.warning("%s It multiplies in bfloat16 or float32 from here on.", culprit)
        (guided,) = denoise(mmdit, [question])
    return guided


def _widen(layer: Fp8Linear) -> bool:
    """Change the layer's path to one that overflows last; whether that was possible."""
    if layer.given_up or _is_wide(layer):
        return False
    layer.use(Choice(PLAIN_WIDE, {}))
    return True


def _is_wide(layer: nn.Module | None) -> bool:
    return isinstance(layer, Fp8Linear) and layer.choice is not None and layer.choice.backend is PLAIN_WIDE


def _advice(layer: nn.Module | None, retry_bf16: bool) -> str:
    if isinstance(layer, Fp8Linear) and retry_bf16 and layer.given_up:
        return "It has given up its FP8 weights for --fast, so that it cannot be retried: leave --fast out."
    if isinstance(layer, Fp8Linear) and not retry_bf16:
        return "Try --retry-bf16, --dtype float32 or another file of the model."
    return "Try --dtype float32 or another file of the model."


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
