"""Nodes that change how a model is sampled from; its weights stay as they are."""

import re

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes.types import ModelLink, SkipLayers
from octavo.graph.spec import FLOAT, LINK, STRING, NodeSpec, node
from octavo.sampling import SkipLayerGuidance
from octavo.sampling.schedule import MOST_SHIFT

_LAYERS = STRING("7, 8, 9", multiline=False)
_SCALE = FLOAT(3.0, min=0.0, max=10.0, step=0.1)
_START = FLOAT(0.01, min=0.0, max=1.0, step=0.001)
_END = FLOAT(0.15, min=0.0, max=1.0, step=0.001)
_NUMBERS = re.compile(r"[\d\s,;]*")


@node(
    "ModelSamplingSD3",
    module="comfy_extras.nodes_model_advanced",
    classic=True,
    category="advanced/model",
    description="The shift of the schedule: above 1 more steps are spent at high noise. SD3.5 is released with 3.",
    inputs={"model": LINK("MODEL"), "shift": FLOAT(3.0, min=0.0, max=100.0, step=0.01)},
    outputs=("MODEL",),
)
def model_sampling_sd3(_context: Context, model: ModelLink, shift: float) -> tuple[ModelLink]:
    """The model with another shift.

    Raises:
        RequestError: a shift of 0, at which no level but 0 is left.
    """
    if not 0 < shift <= MOST_SHIFT:
        raise RequestError(f"shift {shift}: need a number above 0, at most {MOST_SHIFT}; SD3.5 is released with 3.")
    return (model.edited(shift=shift),)


@node(
    "RescaleCFG",
    module="comfy_extras.nodes_model_advanced",
    classic=True,
    category="advanced/model",
    description="Brings guided predictions back to the contrast of the prompt's own, against overexposure.",
    inputs={"model": LINK("MODEL"), "multiplier": FLOAT(0.7, min=0.0, max=1.0, step=0.01)},
    outputs=("MODEL",),
)
def rescale_cfg(_context: Context, model: ModelLink, multiplier: float) -> tuple[ModelLink]:
    """See `sampling.guidance.rescaled`."""
    return (model.edited(rescale=multiplier),)


@node(
    "SkipLayerGuidanceSD3",
    module="comfy_extras.nodes_sd3",
    category="advanced/guidance",
    description="Pushes the picture away from what the model draws without some of its layers; made for SD3.5 Medium, "
    "with layers 7, 8, 9.",
    inputs={
        "model": LINK("MODEL"),
        "layers": _LAYERS,
        "scale": _SCALE,
        "start_percent": _START,
        "end_percent": _END,
    },
    outputs=("MODEL",),
    experimental=True,
)
def skip_layer_guidance_sd3(
    _context: Context, model: ModelLink, layers: str, scale: float, start_percent: float, end_percent: float
) -> tuple[ModelLink]:
    """Skip-layer guidance, see `sampling.SkipLayerGuidance`."""
    return (_skipping(model, layers, "layers", scale, start_percent, end_percent),)


@node(
    "SkipLayerGuidanceDiT",
    module="comfy_extras.nodes_slg",
    category="advanced/guidance",
    description="SkipLayerGuidanceSD3 with rescaling. SD3.5 has double layers only: there are no single ones to skip.",
    inputs={
        "model": LINK("MODEL"),
        "double_layers": _LAYERS,
        "single_layers": _LAYERS,
        "scale": _SCALE,
        "start_percent": _START,
        "end_percent": _END,
        "rescaling_scale": FLOAT(0.0, min=0.0, max=10.0, step=0.01),
    },
    outputs=("MODEL",),
    experimental=True,
)
def skip_layer_guidance_dit(
    _context: Context,
    model: ModelLink,
    double_layers: str,
    single_layers: str,
    scale: float,
    start_percent: float,
    end_percent: float,
    rescaling_scale: float,
) -> tuple[ModelLink]:
    """Skip-layer guidance; `single_layers` names layers of a kind that no SD3 has, so that none of them is skipped."""
    _numbers(single_layers, "single_layers")
    return (_skipping(model, double_layers, "double_layers", scale, start_percent, end_percent, rescaling_scale),)


def _skipping(
    model: ModelLink, text: str, name: str, scale: float, start: float, end: float, rescale: float = 0.0
) -> ModelLink:
    """The model with skip-layer guidance; as it was where there is nothing to skip.

    Raises:
        RequestError: layers that it does not have, an empty interval, a rescaling above 1, or a second guidance of
            this kind.
    """
    layers = tuple(sorted(set(_numbers(text, name))))
    if not layers:
        return model
    if model.skip_layers is not None:
        raise RequestError("The model has skip-layer guidance already; remove one of the two nodes.")
    depth = model.model.config.depth
    if layers[-1] >= depth:
        raise RequestError(f"{name} '{text}': '{model.model.name}' has the layers 0 to {depth - 1}.")
    guidance = SkipLayerGuidance(scale=scale, layers=layers, start=start, end=end, rescale=rescale)
    return model.edited(skip_layers=SkipLayers(guidance=guidance, shift=model.shift))


def _numbers(text: str, name: str) -> list[int]:
    """The whole numbers in a list such as "7, 8, 9".

    Raises:
        RequestError: there is anything else.
    """
    if not _NUMBERS.fullmatch(text):
        raise RequestError(f"{name} '{text}': need numbers of layers with commas between them, such as 7, 8, 9.")
    return [int(number) for number in re.findall(r"\d+", text)]


NODES: tuple[NodeSpec, ...] = (model_sampling_sd3, rescale_cfg, skip_layer_guidance_sd3, skip_layer_guidance_dit)
