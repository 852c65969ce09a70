"""Stable Diffusion 3.5 in 8 bits.

>>> from octavo import GenerateRequest, generate, load
>>> components = load("sd3.5_medium")  # or nothing: the embedded model
>>> (picture,) = generate(components, GenerateRequest(prompt="a red star on a blue background", seed=1))
>>> picture.save("star.png")

Names are imported when first used, for torch takes its time.
"""

import importlib
from typing import TYPE_CHECKING, Any

from octavo import errors
from octavo._version import __version__

if TYPE_CHECKING:
    from octavo.compress.job import quantize_checkpoint
    from octavo.compress.settings import QuantizeSettings
    from octavo.pipeline.assemble import load
    from octavo.pipeline.components import Components
    from octavo.pipeline.generate import generate, generate_each
    from octavo.pipeline.hires import Hires
    from octavo.pipeline.image import Picture
    from octavo.pipeline.request import GenerateRequest, Lora

__all__ = [
    "Components",
    "GenerateRequest",
    "Hires",
    "Lora",
    "Picture",
    "QuantizeSettings",
    "__version__",
    "errors",
    "generate",
    "generate_each",
    "load",
    "quantize_checkpoint",
]

_HOMES = {
    "Components": "octavo.pipeline.components",
    "load": "octavo.pipeline.assemble",
    "generate": "octavo.pipeline.generate",
    "generate_each": "octavo.pipeline.generate",
    "Hires": "octavo.pipeline.hires",
    "Picture": "octavo.pipeline.image",
    "GenerateRequest": "octavo.pipeline.request",
    "Lora": "octavo.pipeline.request",
    # Not `quantize`: that is the room of this name, and would be one or the other by who was imported first.
    "quantize_checkpoint": "octavo.compress.job",
    "QuantizeSettings": "octavo.compress.settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
