"""The files that a job writes: where, in which form, by which recipe."""

import errno
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from octavo.checkpoint.header import read_header
from octavo.checkpoint.octavo_form import CALIBRATION_KEY, RECIPE_KEY
from octavo.checkpoint.quantized import LayerOutput, Output, OutputForm, plan_output
from octavo.compress.gate import Verdict
from octavo.compress.layers import outputs_of
from octavo.compress.settings import QuantizeSettings
from octavo.compress.stages import Stages
from octavo.errors import CheckpointError, OctavoError, RequestError
from octavo.quantize import Recipe

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One file that was written."""

    path: Path
    form: OutputForm
    recipe: Recipe
    nbytes: int
    linear_weights: int  # of the diffusion model
    fp8_weights: int  # of them
    kept: tuple[str, ...]  # linear layers that stayed in 16 bits
    verdict: Verdict


@dataclass(slots=True, kw_only=True)
class File:
    """One output on its way."""

    place: Path  # where it shall be
    part: Path  # where it is made
    form: OutputForm
    recipe: Recipe
    output: Output
    layers: Mapping[str, LayerOutput]
    tuned: Path | None = None  # the fine-tuned file, made of `part`
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def result(self) -> Path:
        """The file as it is to be."""
        return self.part if self.tuned is None else self.tuned

    @property
    def complete(self) -> bool:
        """Whether `part` is this very file already, from a job that was stopped later."""
        if not self.part.is_file():
            return False
        try:
            header = read_header(self.part)
        except OctavoError:
            return False
        return (
            dict(header.metadata) == dict(self.output.metadata) and header.entries.keys() == self.output.layout.keys()
        )

    @property
    def rounds_inputs(self) -> bool:
        """Whether there are layers whose inputs are rounded when they are multiplied in FP8."""
        return any(not layer.spec.full_precision for layer in self.layers.values())

    def put_in_place(self) -> None:
        """Let the finished file appear where it shall be, all at once.

        Raises:
            CheckpointError: it cannot; it stays where it is.
        """
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(self.result, self.place)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # The work was on another disk.
                beside = self.place.with_name(f".{self.place.name}.new")
                shutil.copyfile(self.result, beside)
                os.replace(beside, self.place)
        except OSError as error:
            raise CheckpointError(f"'{self.place}' cannot be written: {error.strerror or error}.") from error

    def nbytes_of(self, tensor: str) -> int:
        dtype, shape = self.output.layout[tensor]
        return math.prod(shape) * dtype.itemsize

    def told(self, stream: Stages) -> Written:
        """What there is to say of it."""
        counts = dict[str, int]()
        for name in stream.plan.linears:
            linear = stream.model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            counts[name] = linear.weight.numel()
        return Written(
            path=self.place,
            form=self.form,
            recipe=self.recipe,
            nbytes=self.output.nbytes,
            linear_weights=sum(counts.values()),
            fp8_weights=sum(counts[name] for name in self.layers),
            kept=tuple(name for name in counts if name not in self.layers),
            verdict=self.verdict,
        )


def targets(source: Path, out: Path, settings: QuantizeSettings) -> list[Path]:
    """Where the files go.

    Raises:
        RequestError: not to a .safetensors file, to the source itself, or to where a file is already.
    """
    if out.suffix != SUFFIX:
        raise RequestError(f"'{out}' is not the name of a .safetensors file; write '{out.with_suffix(SUFFIX)}'.")
    places = [out, out.with_stem(f"{out.stem}-comfy")] if settings.form == "both" else [out]
    for place in places:
        if place.exists() and source.exists() and place.samefile(source):
            raise RequestError(f"'{place}' is the model that is to be quantized. Give the output another name.")
        if place.is_dir():
            raise RequestError(f"'{place}' is a folder. Give the name of a file.")
        if place.exists() and not settings.force:
            raise RequestError(f"'{place}' is there already. Give another name, or --force to replace it.")
    return places


def plan_file(
    stream: Stages,
    place: Path,
    form: OutputForm,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    digest: str | None = None,
) -> File:
    """Lay a file out.

    Args:
        folder: where it is made; None as long as none is made.
        digest: of what the recipe is calibrated on.

    Raises:
        RequestError: the source is in FP8 already, the recipe keeps everything, or the form cannot say what it asks.
    """
    layers = outputs_of(stream, recipe)
    said = {RECIPE_KEY: recipe.to_toml()}
    if digest is not None and recipe.needs_calibration:
        said[CALIBRATION_KEY] = digest
    output = plan_output(stream.plan, layers, form, said)
    if not layers:
        raise RequestError(f"The recipe '{recipe.name}' keeps every layer in 16 bits, so there is nothing to quantize.")
    part = (folder or place.parent) / place.name
    return File(place=place, part=part, form=form, recipe=recipe, output=output, layers=layers)
