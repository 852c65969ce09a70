"""Nodes run by themselves: a context without models, and a VAE made of whatever module is at hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from octavo.graph.context import Context
from octavo.models import VAE, VAEConfig
from octavo.pipeline.shelf import Shelf, Vae


def bare(folder: Path = Path("/nowhere"), *, tiled_vae: bool | None = None, **more: Any) -> Context:
    """A context whose folders lie in `folder`, and whose shelf is empty."""
    shelf = cast(Shelf, SimpleNamespace(settings=SimpleNamespace(tiled_vae=tiled_vae)))
    folders = {f"{kind}_dir": folder / kind for kind in ("input", "output", "temp")}
    return Context(shelf=shelf, solve=cast(Any, None), **folders | more)


class Held:
    """A `Part` that is loaded already."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, model: VAE) -> None:
        self.model, self.config = model, model.config

    def __call__(self) -> VAE:
        return self.model


def as_vae(model: VAE) -> Vae:
    """What travels on a VAE link."""
    return Vae(part=cast(Any, Held(model)), name="test", embedded=False)


def small_vae() -> Vae:
    """A VAE of the real kind, thin and random."""
    torch.manual_seed(0)
    return as_vae(VAE(VAEConfig(channels=(8, 8, 8, 8), layers_per_block=1, groups=4)))


def gradient(height: int = 40, width: int = 56, batch: int = 1) -> torch.Tensor:
    """Pictures [B, H, W, 3] whose values differ everywhere, all multiples of 1/255."""
    levels = torch.arange(batch * height * width * 3) * 37 % 256
    return levels.view(batch, height, width, 3).float() / 255
