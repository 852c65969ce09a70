"""Nodes that turn texts into conditioning."""

from collections.abc import Callable

import torch

from octavo.devices import whole_processor
from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes.types import Conditions, given
from octavo.graph.spec import COMBO, INT, LINK, STRING, NodeSpec, node
from octavo.models import ClipConfig
from octavo.pipeline.conditions import Condition
from octavo.pipeline.encode import LONGEST_PROMPT, Conditioning
from octavo.pipeline.shelf import Clip

_MISSING = "load text encoders with TripleCLIPLoader and connect them."


@node(
    "CLIPTextEncode",
    display_name="CLIP Text Encode (Prompt)",
    category="conditioning",
    description="Turns a text into what the model is told. (word:1.2) weighs words, embedding:name inserts one.",
    inputs={
        "text": STRING(multiline=True, dynamicPrompts=True, tooltip="What to encode."),
        "clip": LINK("CLIP", tooltip="Encodes it."),
    },
    outputs=("CONDITIONING",),
    output_tooltips=("What the model is told.",),
    search_aliases=("text", "prompt", "positive prompt", "negative prompt", "encode text", "text encoder"),
)
def clip_text_encode(context: Context, text: str, clip: Clip | None) -> tuple[Conditions]:
    """One text for all encoders."""
    encoders = given(clip, "CLIP", _MISSING)
    return _encoded(context, lambda: context.shelf.encode(encoders, text), text)


@node(
    "CLIPTextEncodeSD3",
    module="comfy_extras.nodes_sd3",
    category="advanced/conditioning",
    description="A text of its own for each encoder. With empty_padding none, an encoder without text tells nothing; "
    "CLIP-L and CLIP-G stand side by side, so that they do so only together.",
    inputs={
        "clip": LINK("CLIP"),
        "clip_l": STRING(multiline=True, dynamicPrompts=True),
        "clip_g": STRING(multiline=True, dynamicPrompts=True),
        "t5xxl": STRING(multiline=True, dynamicPrompts=True),
        "empty_padding": COMBO(("none", "empty_prompt")),
    },
    outputs=("CONDITIONING",),
    search_aliases=("sd3 prompt",),
)
def clip_text_encode_sd3(
    context: Context, clip: Clip | None, clip_l: str, clip_g: str, t5xxl: str, empty_padding: str
) -> tuple[Conditions]:
    """Three texts, one for each encoder."""
    encoders = given(clip, "CLIP", _MISSING)

    def encode() -> Conditioning:
        return context.shelf.encode(
            encoders, clip_l, prompt_clip_g=clip_g, prompt_t5=t5xxl, skip_empty=empty_padding == "none"
        )

    return _encoded(context, encode, clip_l, clip_g, t5xxl)


@node(
    "CLIPSetLastLayer",
    display_name="CLIP Set Last Layer",
    category="conditioning",
    description="Which of CLIP's last layers is read; SD3.5 is made for -2. T5 is always read to its end.",
    inputs={"clip": LINK("CLIP"), "stop_at_clip_layer": INT(-1, min=-24, max=-1, step=1)},
    outputs=("CLIP",),
)
def clip_set_last_layer(_context: Context, clip: Clip | None, stop_at_clip_layer: int) -> tuple[Clip]:
    """The same encoders, CLIP read from another layer: -1 is the last one.

    Raises:
        RequestError: one of the encoders has fewer layers.
    """
    clip = given(clip, "CLIP", _MISSING)
    layers = [part.config.layers for part in clip.parts if isinstance(part.config, ClipConfig)]
    if any(-stop_at_clip_layer > count for count in layers):
        raise RequestError(
            f"stop_at_clip_layer {stop_at_clip_layer}: a text encoder of '{clip.name}' has {min(layers)} layers; use "
            f"-1 to -{min(layers)}."
        )
    return (clip.skipping(-stop_at_clip_layer),)


def _encoded(context: Context, encode: Callable[[], Conditioning], *texts: str) -> tuple[Conditions]:
    """What `encode` gives for the texts on the device, holding everywhere and all the time."""
    if (longest := max(map(len, texts))) > LONGEST_PROMPT:
        raise RequestError(f"The text has {longest:,} letters, and {LONGEST_PROMPT:,} are the most. Make it shorter.")

    @torch.inference_mode()
    @whole_processor()
    def work() -> Conditioning:
        return encode()

    return ((Condition(conditioning=context.on_device(work)),),)


NODES: tuple[NodeSpec, ...] = (clip_text_encode, clip_text_encode_sd3, clip_set_last_layer)
