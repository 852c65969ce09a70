"""How wrong a model's velocity is, by step and by layer, when it is asked exactly what the reference was asked.

Errors of whole pictures mix what a step gets wrong with what the steps before it did. So the reference draws a few
pictures and every question of its sampler is kept, with its answers (teacher forcing); then each model answers the
same questions, x and sigma unchanged, and its answers are compared: the velocity at every step, and the output of
every joint block at some of them. Text is encoded by each model's own encoders; the prompt's pass is compared, without
guidance, which would only multiply the error.

S steps of which some, T, keep block outputs; n image and L text tokens of which at most `TOKENS` are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from octavo.checkpoint.save import save_safetensors
from octavo.compress.lessons import follow
from octavo.devices import whole_processor
from octavo.models import MMDiT
from octavo.pipeline.components import Components
from octavo.pipeline.denoise import Track, make_tables
from octavo.pipeline.generate import prepare
from octavo.pipeline.request import GenerateRequest, Job, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKENS = 64  # of each stream, evenly spread: all of a 128×128 picture, few enough of a large one to be kept on disk
STEPS_WITH_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class VelocityErrors:
    """Relative root mean square errors over all prompts; 0 where a model answers as the reference does."""

    sigmas: tuple[float, ...]  # by step
    by_step: tuple[float, ...]  # of the velocity
    image_by_block: tuple[float, ...]  # of the image tokens that leave each joint block
    context_by_block: tuple[float, ...]  # of the text tokens; one fewer, for the last block gives none
    whole: float  # of the velocity over all steps

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> VelocityErrors:
        """What `to_json` gave."""
        return cls(
            sigmas=tuple(data["sigmas"]),
            by_step=tuple(data["by_step"]),
            image_by_block=tuple(data["image_by_block"]),
            context_by_block=tuple(data["context_by_block"]),
            whole=float(data["whole"]),
        )


def job_of(components: Components, request: GenerateRequest) -> Job:
    """The request without gaps, for this model."""
    return resolve(request, components.preset, model=components.name, max_side=components.max_side)


@torch.inference_mode()
@whole_processor()
def record(components: Components, requests: Sequence[GenerateRequest], folder: Path) -> None:
    """Let the reference draw, and keep what it was asked and what it answered; prompts kept before are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, request in enumerate(requests):
        path = folder / f"{index:03}.safetensors"
        if not path.exists():
            save_safetensors(path, _run(components, job_of(components, request)), None)


def _run(components: Components, job: Job) -> dict[str, Tensor]:
    """One run of the sampler: its questions x [S, 16, h, w] and sigmas [S], and the answers to them."""
    track = prepare(components, job)
    mmdit = components.mmdit()
    asked, _latents = follow(mmdit, job, track, components.device)
    kept = _answers(mmdit, track, asked)
    kept["x"] = torch.cat([x for x, _ in asked]).float().cpu()
    kept["sigmas"] = torch.tensor([sigma for _, sigma in asked], dtype=torch.float64)
    return kept


def _answers(mmdit: MMDiT, track: Track, asked: Sequence[tuple[Tensor, float]]) -> dict[str, Tensor]:
    """Velocities [S, 16, h, w]; of T steps blocks' outputs, image [T, depth, n, D], context [T, depth - 1, L, D]."""
    velocities, images, contexts = [], [], []
    with_blocks = steps_with_blocks(len(asked))
    for step, (x, sigma) in enumerate(asked):
        make_tables(mmdit, track, [sigma])
        prompt = track.positive[0].conditioning
        context = prompt.context
        with _block_outputs(mmdit, wanted=step in with_blocks) as (image_tokens, text_tokens):
            velocities.append(mmdit(x.to(context.dtype), context, track.tables[prompt, sigma]))
        if step in with_blocks:
            images.append(torch.stack(image_tokens))
            contexts.append(torch.stack(text_tokens) if text_tokens else torch.empty(0))
    return {
        "velocity": torch.cat(velocities).float().cpu(),
        "image": torch.stack(images),
        "context": torch.stack(contexts),
    }


def steps_with_blocks(steps: int) -> tuple[int, ...]:
    """Which of `steps` keep block outputs: at most `STEPS_WITH_BLOCKS`, evenly spread, the first and last included."""
    count = min(steps, STEPS_WITH_BLOCKS)
    return tuple(round(i * (steps - 1) / max(1, count - 1)) for i in range(count))


@contextmanager
def _block_outputs(mmdit: MMDiT, *, wanted: bool) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collects what leaves each joint block while the model runs: image tokens [n, D] and text tokens [L, D]."""
    images: list[Tensor] = []
    contexts: list[Tensor] = []
    last = len(mmdit.joint_blocks) - 1

    def keep(index: int, out: tuple[Tensor, Tensor]) -> None:
        context, x = out
        images.append(_spread(x[0]))
        if index < last:
            contexts.append(_spread(context[0]))

    handles = [
        block.register_forward_hook(lambda _block, _in, out, index=index: keep(index, out))
        for index, block in enumerate(mmdit.joint_blocks)
        if wanted
    ]
    try:
        yield images, contexts
    finally:
        for handle in handles:
            handle.remove()


def _spread(tokens: Tensor) -> Tensor:
    """At most `TOKENS` of [n, D], evenly spread, in float32: 16-bit copies would add an error of their own."""
    count = min(len(tokens), TOKENS)
    index = torch.linspace(0, len(tokens) - 1, count, device=tokens.device).round().long()
    return tokens[index].float().cpu()


@torch.inference_mode()
@whole_processor()
def replay(components: Components, requests: Sequence[GenerateRequest], folder: Path) -> VelocityErrors:
    """Ask a model what the reference was asked, and compare the answers.

    Args:
        components: any model of the reference's shape.
        requests: those that were given to `record`.
        folder: where it kept the answers.
    """
    steps: list[Sums] = []
    image: list[Sums] = []
    context: list[Sums] = []
    sigmas: list[float] = []
    for index, request in enumerate(requests):
        with safe_open(folder / f"{index:03}.safetensors", framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        track = prepare(components, job_of(components, request))
        asked = [
            (x[None].to(components.device), float(sigma))
            for x, sigma in zip(kept["x"], kept["sigmas"].tolist(), strict=True)
        ]
        mmdit = components.mmdit()
        make_tables(mmdit, track, [sigma for _, sigma in asked])
        got = _answers(mmdit, track, asked)
        sigmas = max(sigmas, kept["sigmas"].tolist(), key=len)
        _add(steps, got["velocity"], kept["velocity"])
        _add(image, got["image"].transpose(0, 1), kept["image"].transpose(0, 1))
        _add(context, got["context"].transpose(0, 1), kept["context"].transpose(0, 1))
    return VelocityErrors(
        sigmas=tuple(sigmas),
        by_step=tuple(each.relative for each in steps),
        image_by_block=tuple(each.relative for each in image),
        context_by_block=tuple(each.relative for each in context),
        whole=sum(steps, Sums()).relative,
    )


@dataclass(frozen=True, slots=True)
class Sums:
    """Squares of differences and of what was wanted, added up over prompts."""

    difference: float = 0.0
    wanted: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.difference + other.difference, self.wanted + other.wanted)

    @property
    def relative(self) -> float:
        """Root mean square of the differences over that of what was wanted."""
        return (self.difference / self.wanted) ** 0.5 if self.difference else 0.0


def _add(sums: list[Sums], got: Tensor, wanted: Tensor) -> None:
    """Add the squares of each row of [S, …] to that row's sums; rows that no prompt had before are new."""
    sums += [Sums()] * (len(wanted) - len(sums))
    for row, (a, b) in enumerate(zip(got.double(), wanted.double(), strict=True)):
        sums[row] += Sums(float((a - b).square().sum()), float(b.square().sum()))
