"""One stage of a model at a time: what its linear layers see, and what becomes of them."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor, nn

from octavo.checkpoint.quantized import LayerOutput
from octavo.compress.points import GROUPS
from octavo.compress.stages import Batch, Stages
from octavo.devices import trim_memory
from octavo.fp8 import LinearSpec
from octavo.models.controlnet import ImageBlock
from octavo.models.mmdit import FinalLayer, JointBlock
from octavo.quantize import Observer, QuantizedLayer, Recipe, quantize_layer
from octavo.quantize.recipe import Statistic
from octavo.quantize.seams import Seam, block_seams, equalize, final_seams, stream_seams


def outputs_of(stream: Stages, recipe: Recipe) -> dict[str, LayerOutput]:
    """What the recipe makes of each layer that it does not keep in 16 bits, as a file's layout depends on it."""
    outputs = {}
    for name in stream.plan.linears:
        rule = recipe.rule(name)
        if not rule.keep:
            linear = stream.model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            outputs[name] = LayerOutput(
                spec=LinearSpec(
                    format=rule.fp8_format,
                    granularity=rule.granularity,
                    block=rule.block,
                    input_scale=rule.input == "static",
                    step_sigmas=recipe.step_sigmas if rule.input_steps else (),
                    full_precision=rule.input == "exact",
                ),
                low_rank=min(rule.low_rank, linear.in_features, linear.out_features),
            )
    return outputs


def quantized_layers(
    stream: Stages, stage: str, batches: Sequence[Batch], recipe: Recipe, names: Collection[str], *, advance: bool
) -> Iterator[tuple[str, QuantizedLayer]]:
    """Quantize linear layers of a stage by what they see of `batches`.

    Args:
        stream: the 16-bit model.
        stage: one of its stages.
        batches: at the stage's beginning; may be empty where the recipe needs no calibration.
        recipe: what to do.
        names: of the layers.
        advance: whether the batches shall have gone through the (16-bit) stage when the last layer is given.
    """
    if recipe.equalize and names and batches and _seams(stream, stage):
        yield from _equalized(stream, stage, batches, recipe, names)
        if advance:
            with stream.loaded(stage):
                stream.advance(stage, batches)
        return
    observer = None
    needs = {name: recipe.rule(name).statistics for name in names}
    if batches and (advance or any(needs.values())):
        with stream.loaded(stage):
            seen = batches if advance else [batch.branch() for batch in batches]
            observer = observe(stream, stage, seen, needs)
    for name in names:
        weight, bias = stream.weights(name)
        statistics = None if observer is None else observer.statistics(name)
        yield name, quantize_layer(name, weight, bias, recipe.rule(name), statistics, recipe.step_sigmas)
        del weight, statistics
        trim_memory()


def observe(
    stream: Stages, stage: str, batches: Sequence[Batch], needs: Mapping[str, frozenset[Statistic]]
) -> Observer:
    """Take `batches` through a stage that is loaded, watching the layers in need."""
    layers = {name: stream.model.get_submodule(name) for name in needs}
    with Observer(layers, needs, GROUPS) as observer:

        def turn(batch: Batch) -> None:
            observer.group = batch.group

        stream.advance(stage, batches, before=turn)
    return observer


def _equalized(
    stream: Stages, stage: str, batches: Sequence[Batch], recipe: Recipe, names: Collection[str]
) -> Iterator[tuple[str, QuantizedLayer]]:
    """The same for a copy of the stage whose outliers are evened out: it computes the same and rounds better."""
    sizes: dict[str, frozenset[Statistic]] = {name: frozenset({"range"}) for name in names}
    needs = {name: recipe.rule(name).statistics for name in names}
    module = stream.module(stage)
    assert module is not None
    with stream.loaded(stage):
        before = observe(stream, stage, [batch.branch() for batch in batches], sizes)
        even = copy.deepcopy(module)
        with stream.replaced(stage, even):
            layers = {name: stream.model.get_submodule(name) for name in names}
            squares = {
                layers[name]: statistics.square for name in names if (statistics := before.statistics(name)) is not None
            }
            del before
            # What stays in 16 bits is copied to the file as it is, so it must not be rescaled.
            seams = [seam for seam in _seams(stream, stage) if _touched(seam) <= set(layers.values())]
            equalize(iter(seams), squares)
            after = observe(stream, stage, [batch.branch() for batch in batches], needs)
    for name in names:
        weight, bias = (_plain(tensor) for tensor in (layers[name].weight, layers[name].bias))
        assert weight is not None
        statistics = after.statistics(name)
        yield name, quantize_layer(name, weight, bias, recipe.rule(name), statistics, recipe.step_sigmas)
        trim_memory()


def _seams(stream: Stages, stage: str) -> list[Seam]:
    match stream.module(stage):
        case JointBlock() as block:
            return list(block_seams(block))
        case FinalLayer() as final:
            return list(final_seams(final))
        case ImageBlock() as image_block:
            return list(stream_seams(image_block))
    return []


def _touched(seam: Seam) -> set[nn.Module]:
    return {*(rows.linear for rows in (*seam.rows, *seam.over_rows)), *seam.over_columns}


def _plain(tensor: object) -> Tensor | None:
    return tensor.detach() if isinstance(tensor, Tensor) else None
