"""Conversions for tests."""

from pathlib import Path

from octavo.checkpoint.convert import Conversion, Wishes, plan_conversion
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.source import open_source
from tests.checkpoint.samples import MMDIT_PREFIX, VAE_PREFIX, tiny


def convert(source: Path, to: Path, **wishes: object) -> Conversion:
    """Plan and run; `wishes` are fields of `Wishes`."""
    with open_source(source) as opened:
        conversion = plan_conversion(opened, to, Wishes(**wishes))  # type: ignore[arg-type]
        conversion.run()
    return conversion


def write_single(path: Path) -> Path:
    """The tiny MMDiT and VAE in one file."""
    tensors = {MMDIT_PREFIX + name: tensor for name, tensor in tiny("mmdit").items()}
    tensors |= {VAE_PREFIX + name: tensor for name, tensor in tiny("vae").items()}
    save_safetensors(path, tensors, {"modelspec.title": "Tiny"})
    return path
