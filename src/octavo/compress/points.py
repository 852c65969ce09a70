"""What a model is calibrated on: points of its own denoising runs.

A point is what the model is asked in the middle of a run: latents, noise level, prompt. Every prompt is denoised with
the model's own steps and guidance, and of each run a few points are kept, spread over the schedule. All runs of a wave
go step by step together, so that a model read block by block is read once a step and not once a step and prompt.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.tensors import open_tensors
from octavo.compress.blocks import BlockStream
from octavo.compress.stages import Batch
from octavo.errors import CheckpointError, ModelNotFoundError, NumericsError
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.latents import latent_shape
from octavo.sampling import ClassifierFree, Guidance, Predictions, schedule
from octavo.sampling.flow import denoised_from_velocity, velocity
from octavo.sampling.guidance import Pass, SkipLayerGuidance
from octavo.sampling.noise import initial_noise

GROUPS = 4  # parts of the schedule, first to last steps
TOKENS = 2**18  # of all points together, at most: enough for covariances of 9728 channels
TOKENS_AT_ONCE = 4096  # in one call of the model
WAVE_BYTES = 1 << 30  # of hidden states of the prompts that are denoised together
IDENTITY = "octavo.points"
TENSORS = ("latents", "sigmas", "groups", "prompts", "guided")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """How the runs are made: with the settings that pictures are drawn with."""

    steps: int
    guidance_scale: float
    schedule: str
    shift: float
    width: int  # pixels
    height: int  # pixels
    skip_layers: SkipLayerGuidance | None = None
    seed: int = 0  # of the first prompt's noise; counts up

    @property
    def sigmas(self) -> list[float]:
        """Noise levels, `steps` + 1."""
        return schedule(self.schedule, self.steps, shift=self.shift)

    @property
    def step_sigmas(self) -> tuple[float, ...]:
        """Levels at which a new part of the schedule begins, `GROUPS` - 1 of them, falling."""
        return tuple(self.sigmas[-(-group * self.steps // GROUPS)] for group in range(1, GROUPS))

    @property
    def guidance(self) -> Guidance:
        return Guidance(classifier_free=ClassifierFree(scale=self.guidance_scale), skip_layers=self.skip_layers)


@dataclass(frozen=True, slots=True)
class Points:
    """P points, and the prompts that they belong to.

    Attributes:
        latents: [P, 16, h, w] float32, on the CPU.
        sigmas: [P] float32.
        groups: [P] int64, the part of the schedule.
        prompts: [P] int64, into `conditionings`.
        guided: [P] bool, whether the negative prompt is asked too.
        conditionings: by prompt; the negative one last.
    """

    latents: Tensor
    sigmas: Tensor
    groups: Tensor
    prompts: Tensor
    guided: Tensor
    conditionings: Sequence[Conditioning]

    @property
    def digest(self) -> str:
        """A hash of all of it, hexadecimal."""
        state = hashlib.sha256()
        for tensor in self._tensors().values():
            state.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return state.hexdigest()

    def batches(self, device: torch.device, dtype: torch.dtype, *, most: int | None = None) -> list[Batch]:
        """Positive and negative rows, those of one step group and equal length together.

        Args:
            device, dtype: of the arithmetic.
            most: how many points; they are picked evenly.
        """
        every = range(len(self.sigmas))
        if most is not None and most < len(every):
            every = range(0, len(every), -(-len(every) // most))
        rows: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (group, text tokens) → (point, conditioning)
        for point in every:
            negative = [len(self.conditionings) - 1] if bool(self.guided[point]) else []
            for which in (int(self.prompts[point]), *negative):
                length = self.conditionings[which].context.shape[1]
                rows.setdefault((int(self.groups[point]), length), []).append((point, which))
        batches = []
        for (group, length), members in sorted(rows.items()):
            for part in _split(members, _tokens(self.latents) + length):
                points = [point for point, _ in part]
                told = [self.conditionings[which].to(device, dtype) for _, which in part]
                batches.append(
                    Batch(
                        self.latents[points].to(device),
                        self.sigmas[points].to(device),
                        torch.cat([each.context for each in told]),
                        torch.cat([each.pooled for each in told]),
                        group,
                    )
                )
        return batches

    def save(self, path: Path, identity: str) -> None:
        """Write them to `path`, to be read again by whoever asks for the same `identity`."""
        save_safetensors(path, self._tensors(), {IDENTITY: identity})

    @classmethod
    def read(cls, path: Path, identity: str) -> "Points | None":
        """What `save` wrote with this identity; None if there is nothing, or something else."""
        tensors = _read(path, identity)
        if tensors is None:
            return None
        latents, sigmas, groups, prompts, guided = (tensors[name] for name in TENSORS)
        return cls(latents, sigmas, groups, prompts, guided, _told_in(tensors))

    @classmethod
    def join(cls, parts: Sequence["Points"]) -> "Points":
        """All of them; the negative prompt of all is the same."""
        conditionings: list[Conditioning] = []
        prompts = []
        for part in parts:
            prompts.append(part.prompts + len(conditionings))
            conditionings += part.conditionings[:-1]
        return cls(
            torch.cat([part.latents for part in parts]),
            torch.cat([part.sigmas for part in parts]),
            torch.cat([part.groups for part in parts]),
            torch.cat(prompts),
            torch.cat([part.guided for part in parts]),
            [*conditionings, parts[0].conditionings[-1]],
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS} | _as_tensors(self.conditionings)


def find_points(
    stream: BlockStream,
    runs: Runs,
    conditionings: Sequence[Conditioning],
    *,
    folder: Path,
    identity: str,
    done: Callable[[int, int], object] = lambda _done, _total: None,
) -> Points:
    """Denoise all prompts and keep points of their runs; waves that `folder` holds already are not run again.

    Args:
        stream: the model.
        runs: how.
        conditionings: of the prompts, the negative one last.
        folder: where finished waves are kept.
        identity: of everything that the points depend on.
        done: called with the evaluations of blocks, embedders and final layers done, and of all.

    Raises:
        NumericsError: the model gave NaN or infinity.
    """
    *positives, negative = conditionings
    tokens = _tokens(torch.empty(latent_shape(runs.width, runs.height), device="meta"))
    row = (tokens + max(each.context.shape[1] for each in conditionings)) * stream.config.width * stream.dtype.itemsize
    size = max(1, WAVE_BYTES // (2 * row))
    picks = choose_steps(len(positives), runs.steps, tokens=tokens + negative.context.shape[1])
    looked_at = [number for number, picked in enumerate(picks) if picked]
    waves = list(_parts(looked_at, size))
    per_wave, parts = runs.steps * len(stream.stages), list[Points]()

    def report(wave: int, count: int) -> None:
        done(wave * per_wave + count, len(waves) * per_wave)

    for number, wave in enumerate(waves):
        path = folder / f"points-{number}.safetensors"
        points = Points.read(path, identity)
        if points is None:
            members = [(i, positives[i], picks[i]) for i in wave]
            points = _denoise(stream, runs, members, negative, partial(report, number))
            points.save(path, identity)
        parts.append(points)
        report(number + 1, 0)
    return Points.join(parts)


def choose_steps(prompts: int, steps: int, *, tokens: int) -> list[frozenset[int]]:
    """By prompt, the steps at which its run is looked at: one of each part of the schedule, in turn, as far as it goes.

    Args:
        prompts: how many.
        steps: of each run.
        tokens: that a point costs; a guided one costs twice that.
    """
    groups = [[step for step in range(steps) if step * GROUPS // steps == group] for group in range(GROUPS)]
    groups = [group for group in groups if group]
    most = max(len(groups), TOKENS // (2 * tokens))
    chosen: list[set[int]] = [set() for _ in range(prompts)]
    # Every prompt gives one point before any gives a second.
    order = [(prompt, (prompt + turn) % len(groups)) for turn in range(len(groups)) for prompt in range(prompts)]
    for prompt, group in order[:most]:
        inside = groups[group]
        chosen[prompt].add(inside[(prompt // len(groups)) % len(inside)])
    return [frozenset(picked) for picked in chosen]


def save_conditionings(path: Path, conditionings: Sequence[Conditioning], identity: str) -> None:
    """Write encoded prompts to `path`, to be read again by whoever asks for the same `identity`."""
    save_safetensors(path, _as_tensors(conditionings), {IDENTITY: identity})


def read_conditionings(path: Path, identity: str) -> list[Conditioning] | None:
    """What `save_conditionings` wrote with this identity; None if there is nothing, or something else."""
    tensors = _read(path, identity)
    return None if tensors is None else _told_in(tensors)


def identity_of(source: str, prompts: Sequence[str], runs: Runs, device: torch.device, dtype: torch.dtype) -> str:
    """What points depend on, as a hash."""
    said = json.dumps([source, list(prompts), repr(runs), str(device), str(dtype), TOKENS, TOKENS_AT_ONCE, WAVE_BYTES])
    return hashlib.sha256(said.encode()).hexdigest()


@torch.inference_mode()
def _denoise(
    stream: BlockStream,
    runs: Runs,
    members: Sequence[tuple[int, Conditioning, frozenset[int]]],
    negative: Conditioning,
    done: Callable[[int], object],
) -> Points:
    """Euler's steps for all members (number of the prompt, prompt, steps to keep) at once."""
    shape, sigmas, guidance = latent_shape(runs.width, runs.height), runs.sigmas, runs.guidance
    xs = [initial_noise(shape, runs.seed + number).to(stream.device) for number, _, _ in members]
    told = [each.to(stream.device, stream.dtype) for _, each, _ in members]
    free = negative.to(stream.device, stream.dtype)
    kept: list[tuple[Tensor, float, int, int, bool]] = []
    count = 0

    def stage_done(_stage: str) -> None:
        nonlocal count
        count += 1
        done(count)

    for step, (sigma, lower) in enumerate(pairwise(sigmas)):
        passes = guidance.passes(sigma, runs.shift)
        for i, (_, _, picked) in enumerate(members):
            if step in picked:
                kept.append((xs[i].cpu(), sigma, step * GROUPS // runs.steps, i, "uncond" in passes))
        asked = [
            (i, which, free if which == "uncond" else told[i], _skipped(guidance, which))
            for which in passes
            for i in range(len(xs))
        ]
        estimates: list[dict[Pass, Tensor]] = [{} for _ in xs]
        for (i, which), answer in _evaluate(stream, xs, sigma, asked, stage_done):
            estimates[i][which] = denoised_from_velocity(xs[i], answer.to(xs[i].dtype), sigma)
        for i, x in enumerate(xs):
            guided = guidance.combine(x, sigma, Predictions(**estimates[i]), runs.shift).denoised
            xs[i] = x + velocity(x, guided, sigma) * (lower - sigma)
        if not all(bool(torch.isfinite(x).all()) for x in xs):
            raise NumericsError(
                f"The 16-bit model gave NaN or infinity in step {step + 1} of a calibration run. Try --dtype float32, "
                "or another file of the model."
            )
    return Points(
        torch.cat([x for x, *_ in kept]),
        torch.tensor([sigma for _, sigma, *_ in kept], dtype=torch.float32),
        torch.tensor([group for _, _, group, _, _ in kept]),
        torch.tensor([i for _, _, _, i, _ in kept]),
        torch.tensor([guided for *_, guided in kept]),
        [Conditioning(each.context.cpu(), each.pooled.cpu()) for each in [*told, free]],
    )


def _evaluate(
    stream: BlockStream,
    xs: Sequence[Tensor],
    sigma: float,
    asked: Sequence[tuple[int, Pass, Conditioning, tuple[int, ...]]],
    done: Callable[[str], object],
) -> Iterator[tuple[tuple[int, Pass], Tensor]]:
    """The velocity of each question: (number in `xs`, pass, what the model is told, blocks left out)."""
    alike: dict[tuple[int, tuple[int, ...]], list[tuple[int, Pass, Conditioning]]] = {}
    for i, which, told, skipped in asked:
        alike.setdefault((told.context.shape[1], skipped), []).append((i, which, told))
    parts = [
        (part, skipped)
        for (length, skipped), members in alike.items()
        for part in _split(members, _tokens(xs[0]) + length)
    ]
    batches = [
        Batch(
            torch.cat([xs[i] for i, _, _ in part]),
            torch.full((len(part),), sigma, device=stream.device),
            torch.cat([told.context for _, _, told in part]),
            torch.cat([told.pooled for _, _, told in part]),
            skip_layers=skipped,
        )
        for part, skipped in parts
    ]
    for (part, _), answers in zip(parts, stream.velocities(batches, done=done), strict=True):
        for (i, which, _), answer in zip(part, answers.chunk(len(part)), strict=True):
            yield (i, which), answer


def _read(path: Path, identity: str) -> dict[str, Tensor] | None:
    try:
        with open_tensors(path) as file:
            if file.metadata.get(IDENTITY) != identity:
                return None
            return {name: file.read(name) for name in file.entries}
    except (CheckpointError, ModelNotFoundError):
        return None


def _as_tensors(conditionings: Sequence[Conditioning]) -> dict[str, Tensor]:
    contexts = {f"context.{i:06}": each.context.cpu() for i, each in enumerate(conditionings)}
    return contexts | {f"pooled.{i:06}": each.pooled.cpu() for i, each in enumerate(conditionings)}


def _told_in(tensors: Mapping[str, Tensor]) -> list[Conditioning]:
    count = sum(name.startswith("context.") for name in tensors)
    return [Conditioning(tensors[f"context.{i:06}"], tensors[f"pooled.{i:06}"]) for i in range(count)]


def _skipped(guidance: Guidance, which: Pass) -> tuple[int, ...]:
    return guidance.skip_layers.layers if which == "skipped" and guidance.skip_layers is not None else ()


def _tokens(latents: Tensor) -> int:
    """Image tokens of latents [B, 16, h, w], in patches of 2 × 2."""
    return -(-latents.shape[-2] // 2) * -(-latents.shape[-1] // 2)


def _split(members: Sequence[T], tokens: int) -> Iterator[Sequence[T]]:
    """Parts that one call of the model takes; each member has so many tokens."""
    return _parts(members, max(1, TOKENS_AT_ONCE // tokens))


def _parts(members: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (members[start : start + size] for start in range(0, len(members), size))
