"""The nodes that Octavo has, by ComfyUI's names for them; `types` says what travels between them.

Each module ends in a tuple `NODES` of those that it declares. A node with a value that Octavo does not honour refuses
it (`RequestError`) rather than ignore it.
"""

from collections.abc import Mapping
from types import MappingProxyType

from octavo.graph.nodes import (
    conditioning,
    controlnet,
    guiders,
    image,
    image_effects,
    inout,
    latent,
    loaders,
    lora,
    mask,
    model_edits,
    primitives,
    samplers,
    sampling,
    sigmas,
    text,
    vae,
)
from octavo.graph.spec import NodeSpec

_MODULES = (
    *(loaders, lora, text, conditioning, controlnet, model_edits, sampling, samplers, sigmas, guiders),
    *(latent, vae, image, image_effects, mask, inout, primitives),
)

NODES: Mapping[str, NodeSpec] = MappingProxyType({spec.name: spec for module in _MODULES for spec in module.NODES})
"""All nodes by name."""
