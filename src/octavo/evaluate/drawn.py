"""From a column to its pictures: draw those that are missing, and say how they came about."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.evaluate.columns import Column, DiffusersColumn, FolderColumn, ModelColumn, identity, model_facts
from octavo.evaluate.gallery import Gallery, GalleryColumn, Record, write_text
from octavo.evaluate.machine import device_peak, forget_peaks, host_peak
from octavo.evaluate.metrics import relative_error
from octavo.evaluate.prompt_set import Prompt
from octavo.evaluate.velocity import VelocityErrors, job_of, record, replay
from octavo.models import MMDiTConfig
from octavo.pipeline.components import Components
from octavo.pipeline.generate import Progress as Step
from octavo.pipeline.generate import generate_each
from octavo.pipeline.image import Picture
from octavo.pipeline.request import GenerateRequest
from octavo.sampling.guidance import SkipLayerGuidance

OTHER_SEEDS = 1 << 31  # added to the seeds of the column that shows how far pictures of other seeds are apart

SAME_MODEL = ", other seeds"  # ends that column's name

Watch = Callable[[str, str, int, int], None]
"""Called with a column's name, what is done to it, how much of it, and of how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A column's pictures on disk, and what is known of their making.

    Attributes:
        paths: by number of the prompt, from 1.
        same_seed: whether they came from the noise that the reference's came from.
        records: by number; empty for pictures made elsewhere.
        facts: of the model, see `columns.model_facts`.
        velocity: its errors with teacher forcing, if they were measured.
    """

    name: str
    paths: Mapping[int, Path]
    same_seed: bool = False
    records: Mapping[int, Record] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    velocity: VelocityErrors | None = None


@dataclass(slots=True, kw_only=True)
class Studio:
    """Draws the columns of one comparison, one after the other.

    Attributes:
        gallery: where the pictures go.
        prompts: texts, in the order of their numbers.
        settings: of `GenerateRequest`, as the user gave them.
        seed: of the first picture; the next ones count up.
        velocity_prompts: how many of the prompts are asked with teacher forcing; 0 leaves it out.
        other_seeds: whether the reference draws everything a second time, by other seeds.
        template: what all models are asked, without gaps; settled by the first of them, the reference.
        device: on which the reference drew.
    """

    gallery: Gallery
    prompts: Sequence[str]
    settings: Mapping[str, Any]
    seed: int
    velocity_prompts: int
    other_seeds: bool
    watch: Watch
    template: GenerateRequest | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    embedded: bool = False
    _shape: MMDiTConfig | None = None

    def draw(self, column: Column) -> list[Drawn]:
        """The pictures of a column; of the reference, those of other seeds come as a second one where wanted.

        Raises:
            OctavoError: whatever loading or drawing raises.
        """
        if isinstance(column, FolderColumn):
            return [Drawn(name=column.name, paths=column.pictures(self.prompts))]
        if isinstance(column, DiffusersColumn):
            return [self._draw_pipeline(column)]
        with column.opened() as components:
            first = self.template is None
            if first:
                self._settle(components)
            drawn = [self._draw_model(column, components, self.seed, is_reference=first)]
            if first and self.other_seeds:
                again = replace(column, name=f"{column.name}{SAME_MODEL}")
                more = self._draw_model(again, components, self.seed + OTHER_SEEDS, is_reference=False)
                drawn.append(replace(more, same_seed=False))
        return drawn

    def _settle(self, reference: Components) -> None:
        """From now on every model is asked what the reference is asked, whatever its own preset is."""
        job = job_of(reference, GenerateRequest(prompt="settings", seed=0, **self.settings))
        values = {name: getattr(job, name) for name in GenerateRequest.__dataclass_fields__}
        # Without this a model whose preset skips layers would do so although the reference does not.
        values["skip_layer_guidance"] = job.skip_layer_guidance or SkipLayerGuidance(scale=0)
        self.template = GenerateRequest(**{**values, "model": None})
        self.device, self.embedded = reference.device, reference.embedded
        config = reference.mmdit.config
        assert isinstance(config, MMDiTConfig)
        self._shape = config

    def request(self, number: int, seed: int) -> GenerateRequest:
        """What is asked for picture `number`."""
        assert self.template is not None
        return replace(self.template, prompt=self.prompts[number - 1], seed=seed + number - 1)

    def _draw_model(self, column: ModelColumn, components: Components, seed: int, *, is_reference: bool) -> Drawn:
        assert self.template is not None
        drawn_by = {**self._settings(self.template), "seed": seed, **identity(column, components)}
        place = self.gallery.column(column.name, drawn_by)
        missing = [n for n in range(1, len(self.prompts) + 1) if n not in place.records]
        forget_peaks(components.device)
        for done, number in enumerate(missing, len(self.prompts) - len(missing)):
            self.watch(column.name, "draw", done, len(self.prompts))
            picture, made, latents = self._draw_one(components, number, seed, cold=number == missing[0])
            if is_reference:
                self.gallery.keep_latents(number, latents)
            wanted = None if is_reference or seed != self.seed else self.gallery.latents(number)
            error = None
            if wanted is not None and wanted.shape == latents.shape:
                error = relative_error(latents.cpu(), wanted)
            place.add(picture, replace(made, latent_error=error))
        self.watch(column.name, "draw", len(self.prompts), len(self.prompts))
        numbers = range(1, len(self.prompts) + 1)
        return Drawn(
            name=column.name,
            paths={number: place.path(number) for number in numbers},
            same_seed=seed == self.seed,
            records={number: place.records[number] for number in numbers},
            facts=_kept(place, "facts.json", lambda: model_facts(components)),
            velocity=self._velocity(column, components, place, is_reference) if seed == self.seed else None,
        )

    def _settings(self, template: GenerateRequest) -> dict[str, Any]:
        return {key: value for key, value in template.settings.items() if key not in ("prompt", "seed", "model")}

    def _draw_one(
        self, components: Components, number: int, seed: int, *, cold: bool
    ) -> tuple[Picture, Record, Tensor]:
        """A picture, its record, and its final latents [1, 16, h, w]: the last estimate of the clean ones."""
        started = finished = 0.0
        evaluations = 0
        latents = torch.empty(0)

        def watch(step: Step) -> None:
            nonlocal started, finished, evaluations, latents
            if step.stage == "denoise" and step.denoised is None:
                started = finished = time.perf_counter()
            elif step.stage == "denoise":
                assert step.denoised is not None
                finished, evaluations, latents = time.perf_counter(), step.step, step.denoised

        begin = time.perf_counter()
        (picture,) = generate_each(components, self.request(number, seed), watch=watch)
        made = Record(
            number=number,
            seconds=time.perf_counter() - begin,
            denoise_seconds=finished - started,
            evaluations=evaluations,
            cold=cold,
            host_bytes=host_peak(),
            device_bytes=device_peak(components.device),
            latent_error=None,
        )
        return picture, made, latents

    def _velocity(
        self, column: ModelColumn, components: Components, place: GalleryColumn, is_reference: bool
    ) -> VelocityErrors | None:
        """Errors with teacher forcing; none for the reference itself, and for models of another shape."""
        count = min(self.velocity_prompts, len(self.prompts))
        if not count:
            return None
        self.watch(column.name, "velocity", 0, 1)
        folder = self.gallery.folder / "velocity"
        requests = [self.request(number, self.seed) for number in range(1, count + 1)]
        if is_reference:
            record(components, requests, folder)
            self.watch(column.name, "velocity", 1, 1)
            return None
        config, shape = components.mmdit.config, self._shape
        assert isinstance(config, MMDiTConfig)
        assert shape is not None
        if (config.depth, config.width, config.in_channels) != (shape.depth, shape.width, shape.in_channels):
            return None
        kept = _kept(place, f"velocity-{count}.json", lambda: replay(components, requests, folder).to_json())
        self.watch(column.name, "velocity", 1, 1)
        return VelocityErrors.from_json(kept)

    def _draw_pipeline(self, column: DiffusersColumn) -> Drawn:
        request = GenerateRequest(prompt="settings", seed=0, **self.settings)
        place = self.gallery.column(
            column.name, {**self._settings(request), "seed": self.seed, "pipeline": column.path, "dtype": column.dtype}
        )
        missing = [n for n in range(1, len(self.prompts) + 1) if n not in place.records]
        forget_peaks(self.device)
        for done, number in enumerate(missing, len(self.prompts) - len(missing)):
            self.watch(column.name, "draw", done, len(self.prompts))
            asked = replace(request, prompt=self.prompts[number - 1], seed=self.seed + number - 1)
            if number == missing[0]:
                column.pipeline()
            begin = time.perf_counter()
            image = column.draw(asked)
            seconds = time.perf_counter() - begin
            made = Record(
                number=number,
                seconds=seconds,
                denoise_seconds=0.0,  # a pipeline does not tell
                evaluations=0,
                cold=number == missing[0],
                host_bytes=host_peak(),
                device_bytes=device_peak(self.device),
                latent_error=None,
            )
            place.add(Picture(image, {**asked.settings, "model": column.path}), made)
        self.watch(column.name, "draw", len(self.prompts), len(self.prompts))
        column.release()
        numbers = range(1, len(self.prompts) + 1)
        return Drawn(
            name=column.name,
            paths={number: place.path(number) for number in numbers},
            records={number: place.records[number] for number in numbers},
            facts={"headline": f"{column.path}, by diffusers"},
        )


def _kept(place: GalleryColumn, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gave when it was first asked, from the column's folder."""
    path = place.folder / name
    if not path.exists():
        write_text(path, json.dumps(make(), indent=1))
    kept: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return kept


def matched(
    drawn: Sequence[Drawn], theirs: Sequence[Prompt], ours: Sequence[Prompt], *, same_reference: bool
) -> list[Drawn]:
    """Columns of a report under the numbers of another list of prompts, as far as that has their prompts.

    Args:
        drawn: columns of the report.
        theirs: its prompts.
        ours: the prompts of the comparison that they join.
        same_reference: whether the report's reference is the comparison's too; else no picture of it shares its noise
            with the comparison's.

    Raises:
        RequestError: the lists have no prompt in common.
    """
    places: dict[str, list[int]] = {}
    for number, prompt in enumerate(ours, 1):
        places.setdefault(prompt.text, []).append(number)
    number_of = {number: place.pop(0) for number, prompt in enumerate(theirs, 1) if (place := places.get(prompt.text))}
    if not number_of:
        raise RequestError("Two of the reports have no prompt in common; nothing can be compared.")
    return [
        replace(
            each,
            paths={number_of[number]: path for number, path in each.paths.items() if number in number_of},
            records={
                number_of[number]: replace(record, number=number_of[number])
                for number, record in each.records.items()
                if number in number_of
            },
            same_seed=each.same_seed and same_reference,
        )
        for each in drawn
    ]
