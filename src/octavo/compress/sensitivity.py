"""How much each layer hurts when it alone is quantized: measured, so that 16 bits go where they help most.

Every layer is quantized by the recipe and judged in FP8 arithmetic (`plain-w8a8`), all others staying as they are, by
the relative error of the velocity over some of the calibration's points.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from octavo.compress.blocks import BlockStream
from octavo.compress.files import File, plan_file
from octavo.compress.layers import outputs_of, quantized_layers
from octavo.compress.points import WAVE_BYTES, Points
from octavo.compress.settings import QuantizeSettings
from octavo.compress.stages import Batch
from octavo.devices import whole_processor
from octavo.errors import RequestError
from octavo.fp8 import prepare
from octavo.quantize import QuantizedLayer, Recipe, Sensitivity, apply, choose_kept

PROBE_POINTS = 32


@torch.inference_mode()
@whole_processor()
def measure(
    stream: BlockStream, points: Points, recipe: Recipe, done: Callable[[int, int], object] = lambda _done, _total: None
) -> Sensitivity:
    """The sensitivity of every layer that the recipe quantizes.

    Args:
        stream: the 16-bit model.
        points: all are calibrated on, some are measured.
        recipe: by which each layer is quantized.
        done: told the layers done, and of how many.
    """
    names = list(outputs_of(stream, recipe))
    calibration = points.batches(stream.device, stream.dtype) if recipe.needs_calibration else []
    probes = points.batches(stream.device, stream.dtype, most=PROBE_POINTS)
    exact = stream.velocities([batch.branch() for batch in probes])
    errors, weights = dict[str, float](), dict[str, int]()
    for number, stage in enumerate(stream.stages):
        inside = [name for name in stream.linears(stage) if name in names]
        layers = quantized_layers(stream, stage, calibration, recipe, inside, advance=True)
        for several in _few(layers, probes):
            answers = _one_by_one(stream, stage, probes, several)
            rest = stream.stages[number + 1 :]
            velocities = stream.velocities([batch for batches in answers for batch in batches], rest)
            for i, (name, layer) in enumerate(several):
                mine = velocities[i * len(probes) : (i + 1) * len(probes)]
                errors[name] = _relative_error(mine, exact)
                weights[name] = layer.weight.q.numel()
            done(len(errors), len(names))
        with stream.loaded(stage):
            stream.advance(stage, probes)
    return Sensitivity(errors, weights)


def measured(
    stream: BlockStream,
    points: Points | None,
    recipe: Recipe,
    settings: QuantizeSettings,
    folder: Path,
    done: Callable[[int, int], object],
) -> Sensitivity:
    """The sensitivity for `recipe`: read where it was measured before, else measured and kept.

    Raises:
        RequestError: the file that was given is none, or of another model or recipe.
    """
    path = settings.sensitivity
    if path is None:
        assert points is not None, "sensitivity is measured on points"
        told = hashlib.sha256(f"{points.digest}\n{recipe.to_toml()}".encode()).hexdigest()
        path = folder / f"sensitivity-{told[:16]}.json"
    if not path.exists():
        assert points is not None, "sensitivity is measured on points"
        found = measure(stream, points, recipe, done)
        partial = path.with_name(f"{path.name}.new")
        found.save(partial)
        partial.replace(path)
    sensitivity = Sensitivity.read(path)
    if other := sorted(outputs_of(stream, recipe).keys() ^ sensitivity.errors.keys()):
        raise RequestError(
            f"'{path}' is about other layers than those that the recipe '{recipe.name}' quantizes, such as "
            f"'{other[0]}'. Give --sensitivity the name of a new file, and it will be measured."
        )
    return sensitivity


def keep_under(stream: BlockStream, file: File, sensitivity: Sensitivity, settings: QuantizeSettings) -> File:
    """The file with the most sensitive layers in 16 bits, as many as were asked for."""
    recipe = file.recipe.with_kept(choose_kept(sensitivity, spare_weights(stream, file, settings)))
    return plan_file(stream, file.place, file.form, recipe)


def spare_weights(stream: BlockStream, file: File, settings: QuantizeSettings) -> float:
    """How many weights may stay in 16 bits beside those that the recipe keeps.

    Raises:
        RequestError: the budget is too small for any file.
    """
    if settings.budget is not None:
        spare = float(settings.budget - file.output.nbytes)
        if spare < 0:
            raise RequestError(
                f"A budget of {settings.budget / 1e9:.3f} GB is too small: with the recipe '{file.recipe.name}' the "
                f"file takes {file.output.nbytes / 1e9:.3f} GB at least."
            )
        return spare
    told = file.told(stream)
    return (settings.keep_16bit or 0) * told.linear_weights - (told.linear_weights - told.fp8_weights)


def _one_by_one(
    stream: BlockStream, stage: str, probes: Sequence[Batch], layers: Sequence[tuple[str, QuantizedLayer]]
) -> list[list[Batch]]:
    """For each layer the probes after the stage with this layer quantized."""
    answers = []
    with stream.loaded(stage):
        for name, layer in layers:
            plain = stream.model.get_submodule(name)
            apply(stream.model, {name: layer})
            quantized = stream.model.get_submodule(name).to(stream.device)
            backend = None if layer.full_precision else "plain-w8a8"
            prepare(quantized, stream.device, stream.dtype, backend=backend, measure=False)
            answers.append([batch.branch() for batch in probes])
            stream.advance(stage, answers[-1])
            stream.model.set_submodule(name, plain, strict=True)
    return answers


def _few(
    layers: Iterator[tuple[str, QuantizedLayer]], probes: Sequence[Batch]
) -> Iterator[list[tuple[str, QuantizedLayer]]]:
    """Layers by groups, such that hidden states of all their variants fit into memory together."""
    states = [tensor for batch in probes for tensor in (batch.text, batch.image) if tensor is not None]
    nbytes = sum(state.numel() * state.element_size() for state in states)
    most = max(1, WAVE_BYTES // max(nbytes, 1)) if states else 4
    several = []
    for layer in layers:
        several.append(layer)
        if len(several) == most:
            yield several
            several = []
    if several:
        yield several


def _relative_error(answers: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root of the summed squares of the differences over those of the exact velocities."""
    off = sum(float(((a - b).double() ** 2).sum()) for a, b in zip(answers, exact, strict=True))
    size = sum(float((b.double() ** 2).sum()) for b in exact)
    return float((off / max(size, 1e-300)) ** 0.5)
