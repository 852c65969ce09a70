"""Nodes that put LoRAs on a model and its text encoders; no weight changes, so that they cost next to no memory."""

from dataclasses import replace

from octavo.graph.context import Context
from octavo.graph.nodes.loaders import stamps_of
from octavo.graph.nodes.types import ModelLink
from octavo.graph.spec import COMBO, FLOAT, LINK, NodeSpec, files, node
from octavo.models.adapter import Applied
from octavo.pipeline.request import Lora
from octavo.pipeline.shelf import Clip

_STRENGTH = FLOAT(1.0, min=-100.0, max=100.0, step=0.01, tooltip="0 is without; it may be negative.")
_ALIASES = ("lora", "load lora", "apply lora", "lora loader", "lora model")
_DESCRIPTION = "Puts a LoRA on the model: a small file that changes what it draws. Several can follow each other."


@node(
    "LoraLoader",
    display_name="Load LoRA (Model and CLIP)",
    category="loaders",
    description=_DESCRIPTION,
    inputs={
        "model": LINK("MODEL", tooltip="The model that is changed."),
        "clip": LINK("CLIP", tooltip="The text encoders that are changed."),
        "lora_name": COMBO(files("loras"), tooltip="File in the loras folder."),
        "strength_model": _STRENGTH,
        "strength_clip": _STRENGTH,
    },
    outputs=("MODEL", "CLIP"),
    output_tooltips=("The changed model.", "The changed text encoders."),
    search_aliases=_ALIASES,
    is_changed=stamps_of("loras"),
)
def lora_loader(
    context: Context,
    model: ModelLink,
    clip: Clip | None,
    lora_name: str,
    strength_model: float,
    strength_clip: float,
) -> tuple[ModelLink, Clip | None]:
    """Both with the LoRA; what the file does not change stays as it is."""
    lora = Lora(lora_name, strength_model, strength_clip)
    stack = context.shelf.stack(lora, model.model, clip)
    if clip is not None:
        of_text: dict[str, Applied] = {kind: applied for kind, applied in stack.items() if kind != "mmdit"}
        clip = replace(clip, encoders=clip.encoders.adapted(of_text))
    return model.edited(adapters=model.adapters + stack.get("mmdit", ())), clip


@node(
    "LoraLoaderModelOnly",
    display_name="Load LoRA",
    category="loaders",
    description=_DESCRIPTION,
    inputs={"model": LINK("MODEL"), "lora_name": COMBO(files("loras")), "strength_model": _STRENGTH},
    outputs=("MODEL",),
    output_tooltips=("The changed model.", "The changed text encoders."),
    search_aliases=_ALIASES,
    is_changed=stamps_of("loras"),
)
def lora_loader_model_only(
    context: Context, model: ModelLink, lora_name: str, strength_model: float
) -> tuple[ModelLink]:
    """The model with the LoRA; the text encoders stay as they are."""
    stack = context.shelf.stack(Lora(lora_name, strength_model, 0.0), model.model, None)
    return (model.edited(adapters=model.adapters + stack.get("mmdit", ())),)


NODES: tuple[NodeSpec, ...] = (lora_loader, lora_loader_model_only)
