"""Many questions of samplers in, the model's estimates out: the only place that calls the MMDiT.

A `Track` is what one request needs at every step: its prompts, its guidance and its tables of modulation, made for the
whole run before its first step. `denoise` answers the questions of any number of tracks at once; rows that can share a
model call (same latent size, same blocks, LoRAs and ControlNets; texts of any lengths) do. A single picture is the case
of one track. `finite` does the same for numbers that must not be NaN.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from octavo.fp8 import at_sigmas
from octavo.models import ControlNet, MMDiT, Modulation
from octavo.models.adapter import Applied, adapted
from octavo.models.packed import Packed, pack
from octavo.pipeline.conditions import Arranged, Condition, Placed, arrange, mix
from octavo.pipeline.control import Control, pull, steer
from octavo.pipeline.control import Placed as PlacedControl
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.tables import Tables, make_each, make_table
from octavo.placement.graphs import through
from octavo.sampling import Guidance, Guided, Predictions
from octavo.sampling.flow import denoised_from_velocity
from octavo.sampling.guidance import Pass

PATCH = 2  # latent pixels a token covers along one side


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Track:
    """The constant part of one request's denoising."""

    positive: Sequence[Condition]
    negative: Sequence[Condition] | None  # None where neither guidance nor the sampler needs it
    guidance: Guidance
    shift: float  # of the schedule; guidance intervals are fractions of it
    adapters: Applied = ()  # LoRAs that act on the model
    # One row by (prompt, sigma), and by (what gives a ControlNet, prompt, sigma).
    tables: dict[tuple[object, ...], Modulation] = field(default_factory=dict)
    arranged: dict[tuple[object, ...], Arranged] = field(default_factory=dict)  # by shape and device of the latents

    @classmethod
    def of(
        cls,
        positive: Conditioning,
        negative: Conditioning | None,
        guidance: Guidance,
        shift: float,
        adapters: Applied = (),
        control: tuple[Control, ...] = (),
    ) -> "Track":
        """The plain case: one prompt a side, everywhere, from the first step to the last; both follow `control`."""
        sides = [
            None if each is None else (Condition(conditioning=each, control=control),) for each in (positive, negative)
        ]
        return cls(positive=sides[0] or (), negative=sides[1], guidance=guidance, shift=shift, adapters=adapters)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Track":
        """The same with its prompts on another device, in another dtype; itself where they are there already."""
        sides = [[each.to(device, dtype) for each in side] for side in (self.positive, self.negative or ())]
        if all(a is b for a, b in zip([*self.positive, *(self.negative or ())], [*sides[0], *sides[1]], strict=True)):
            return self
        return replace(
            self, positive=sides[0], negative=None if self.negative is None else sides[1], tables={}, arranged={}
        )

    def placed(self, which: Pass, x: Tensor) -> tuple[Placed, ...]:
        """What holds in this pass on latents like `x`, at whatever level."""
        key = (x.shape, x.device)
        if key not in self.arranged:
            size = (x.shape[-2], x.shape[-1])
            self.arranged[key] = arrange(self.positive, self.negative or (), size, self.shift, x)
        if which != "uncond":
            return self.arranged[key].positive
        assert self.negative is not None, "guidance without a negative prompt"
        return self.arranged[key].negative

    @property
    def controls(self) -> tuple[Control, ...]:
        """All ControlNets of its conditions."""
        return tuple(control for each in (*self.positive, *(self.negative or ())) for control in each.control)

    def skip_layers(self, which: Pass) -> tuple[int, ...]:
        """Blocks left out in this pass."""
        skip = self.guidance.skip_layers
        return skip.layers if which == "skipped" and skip is not None else ()


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What a sampler asks of the model."""

    x: Tensor  # [b, 16, h, w]
    sigma: float
    track: Track
    needs_uncond: bool = False
    _rows: list["_Row"] = field(default_factory=list, init=False, repr=False)

    @property
    def rows(self) -> Sequence["_Row"]:
        """What of it goes through the model; found once, for those who plan and those who compute ask for it."""
        if not self._rows:
            self._rows.extend(_rows_of(self))
        return self._rows

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The predictions to make."""
        track = self.track
        return track.guidance.passes(self.sigma, track.shift, needs_uncond=self.needs_uncond)

    @property
    def tokens(self) -> int:
        """Tokens of text and image that answering it takes through the model, over all its rows: what it costs."""
        return sum(len(self.x) * row.tokens for row in self.rows)

    @property
    def heeds(self) -> tuple[object, ...]:
        """What the answer depends on beside x and sigma; equal for two questions of a run that ask for the same."""
        return tuple((row.which, row.placed, row.controls) for row in self.rows)

    @property
    def shapes(self) -> set[tuple[object, ...]]:
        """What of it can share a model call with another question of the same model: that which has an equal shape."""
        return {row.shape for row in self.rows}


def make_tables(
    mmdit: MMDiT, track: Track, sigmas: Sequence[float], *, negative: bool = True, cache: Tables | None = None
) -> None:
    """Fill the track's tables for all `sigmas`, all prompts in one go through the modulation, before the first step.

    Args:
        negative: also for the negative prompts, if there are any.
        cache: where tables of earlier runs may be found, and these are kept.

    Raises:
        WrongModelError: a ControlNet was made for another model.
    """
    for control in track.controls:
        control.check(mmdit.config)
    make = cache.get_each if cache is not None else make_each
    levels = tuple(dict.fromkeys(sigmas))

    def fill(model: MMDiT | ControlNet, prompts: Sequence[Conditioning], adapters: Applied, *key: object) -> None:
        together: dict[tuple[float, ...], list[Conditioning]] = {}  # by the levels that they lack
        for prompt in dict.fromkeys(prompts):
            missing = tuple(sigma for sigma in levels if (*key, prompt, sigma) not in track.tables)
            if missing:
                together.setdefault(missing, []).append(prompt)
        for missing, alike in together.items():
            tables = make(model, [prompt.pooled for prompt in alike], missing, adapters)
            for prompt, whole in zip(alike, tables, strict=True):
                for sigma, row in zip(missing, whole.each(), strict=True):
                    track.tables[*key, prompt, sigma] = row

    conditions = (*track.positive, *((negative and track.negative) or ()))
    fill(mmdit, [condition.conditioning for condition in conditions], track.adapters)
    nets: dict[Callable[[], ControlNet], list[Conditioning]] = {}
    for condition in conditions:
        for control in condition.control:
            nets.setdefault(control.net, []).append(condition.conditioning)
    for net, prompts in nets.items():
        fill(net(), prompts, (), net)


def denoise(mmdit: MMDiT, questions: Sequence[Question], *, most_rows: int | None = None) -> list[Guided]:
    """Answer every question.

    Args:
        mmdit: gets its own dtype; the answers have that of the question's `x`.
        questions: of one or many tracks.
        most_rows: that a call of the model may have; None for all that can share it.

    Returns:
        For each question its guided estimate of the clean latents and the unguided one of the negative prompt (the
        same as guided where the negative is not evaluated), both like its `x`.
    """
    groups: dict[tuple[object, ...], list[tuple[int, _Row]]] = {}
    for i, question in enumerate(questions):
        for row in question.rows:
            groups.setdefault(row.shape, []).append((i, row))

    # By question and pass, what each condition predicts for its part of the latents.
    parts: list[dict[Pass, list[tuple[Placed, Tensor]]]] = [{which: [] for which in q.passes} for q in questions]
    for alike in groups.values():
        alike.sort(key=lambda each: each[1].length)  # as `pack` likes them; those of one length keep their order
        velocities = _evaluate(mmdit, [row for _, row in alike], most_rows)
        for (i, row), velocity in zip(alike, velocities, strict=True):
            estimate = denoised_from_velocity(row.x, velocity, row.sigma)
            parts[i][row.which].append((row.placed, estimate))

    answers = []
    for question, by_pass in zip(questions, parts, strict=True):
        predictions = Predictions(**{which: mix(each, question.x) for which, each in by_pass.items()})
        track = question.track
        answers.append(track.guidance.combine(question.x, question.sigma, predictions, track.shift))
    return answers


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """One condition of one pass of one question: [b, 16, height, width] of a model call."""

    track: Track
    sigma: float
    which: Pass
    placed: Placed
    x: Tensor  # the question's, cropped
    controls: tuple[PlacedControl, ...]  # the ControlNets that act on it now
    shape: tuple[object, ...]  # rows of equal shape can share a call, whatever the lengths of their texts

    @property
    def length(self) -> int:
        """Tokens of its text."""
        return self.placed.conditioning.context.shape[1]

    @property
    def tokens(self) -> int:
        height, width = self.x.shape[-2:]
        image = -(-height // PATCH) * -(-width // PATCH)
        # A released ControlNet has half as many blocks as the model, of image tokens alone.
        return self.length + image + len(self.controls) * image // 2

    def table(self, model: MMDiT | ControlNet, *key: object) -> Modulation:
        """The model's table for its prompt and level, one row; made where the level was not known before the run."""
        prompt, sigma, track = self.placed.conditioning, self.sigma, self.track
        key = (*key, prompt, sigma)
        if key not in track.tables:
            adapters = track.adapters if isinstance(model, MMDiT) else ()
            track.tables[key] = make_table(model, prompt.pooled, [sigma], adapters)
        return track.tables[key]


def _rows_of(question: Question) -> Iterator[_Row]:
    track, sigma = question.track, question.sigma
    for which in question.passes:
        for placed in track.placed(which, question.x):
            if placed.active(sigma):
                x = placed.crop(question.x)
                controls = tuple(each for each in placed.control if each.active(sigma))
                nets = tuple(each.control.net for each in controls)
                shape = (tuple(x.shape[1:]), track.skip_layers(which), track.adapters, nets)
                yield _Row(track, sigma, which, placed, x, controls, shape)


def _evaluate(mmdit: MMDiT, rows: Sequence[_Row], most: int | None) -> list[Tensor]:
    """One call of the model for rows of like shape, several where `most` is less: velocities, in the dtype of `x`."""
    latents, modulations, sigmas = [], [], []
    contexts: list[Tensor] = []
    for row in rows:
        context = row.placed.conditioning.context
        latents.append(row.x.to(context.dtype))
        contexts.extend(context.expand(len(row.x), -1, -1).split_with_sizes([1] * len(row.x)))
        modulations.extend([row.table(mmdit)] * len(row.x))
        sigmas.extend([row.sigma] * len(row.x))
    x = torch.cat(latents)
    skip, adapters = rows[0].track.skip_layers(rows[0].which), rows[0].track.adapters
    pulls = []
    for same in zip(*(row.controls for row in rows), strict=True):
        net, key = same[0].control.net(), same[0].control.net
        told = [(each, len(row.x), row.table(net, key)) for each, row in zip(same, rows, strict=True)]
        pulls.append(pull(net, told, x))
    velocities = []
    for first in range(0, len(x), most or len(x)):
        part = slice(first, first + (most or len(x)))
        text = pack(contexts[part])
        tokens = text.rows if isinstance(text, Packed) else None
        with at_sigmas(mmdit, sigmas[part], tokens=tokens), adapted(mmdit, adapters):
            control = steer(mmdit, pulls, part, x[part], text, sigmas[part])
            table = Modulation.stack(modulations[part])
            velocities.append(through(mmdit)(x[part], text, table, skip_layers=skip, control=control))
    parts = torch.cat(velocities).split_with_sizes([len(row.x) for row in rows])
    return [part.to(row.x.dtype) for row, part in zip(rows, parts, strict=True)]
