"""LPIPS: how different two pictures look, by AlexNet's features and weights fitted to what people say.

Neither network comes with Octavo. A folder for `load_lpips` holds

    alexnet.safetensors    AlexNet of ImageNet, under torchvision's names: features.0.weight, …
    lpips.safetensors      LPIPS's linear weights, version 0.1: lin0.model.1.weight, …; where this file is missing,
                           those that torchmetrics brings are taken

Source: Zhang et al. 2018 (arXiv 1801.03924); Krizhevsky 2014 (arXiv 1404.5997) for the network.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from octavo.errors import CheckpointError, ModelNotFoundError
from octavo.evaluate.metrics import require_torchmetrics

WIDTHS = (64, 192, 384, 256, 256)
PLACES = (0, 3, 6, 8, 10)  # of the convolutions among torchvision's `features`
POOLED_BEFORE = (1, 2)  # convolutions that a maximum over 3×3 pixels goes before
# LPIPS's own normalisation of colours in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# The smallest side that leaves the last maps a pixel.
SMALLEST = 63


class AlexNetMaps(nn.Module):
    """The five rectified maps of AlexNet that LPIPS compares."""

    def __init__(self) -> None:
        super().__init__()
        kinds = ((3, 11, 4, 2), (64, 5, 1, 2), (192, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1))
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, width, kernel, stride, padding)
            for width, (channels, kernel, stride, padding) in zip(WIDTHS, kinds, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W], normalised → [B, 64 | 192 | 384 | 256 | 256, h, w]."""
        maps = []
        for index, conv in enumerate(self.convs):
            if index in POOLED_BEFORE:
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(conv(x))
            maps.append(x)
        return maps


class Lpips:
    """LPIPS, version 0.1, by AlexNet.

    Args:
        network: with its weights.
        weights: by map, one for each channel [C].
    """

    name = "LPIPS (AlexNet)"

    def __init__(self, network: AlexNetMaps, weights: list[Tensor]) -> None:
        self.network, self.weights = network.eval(), weights

    @torch.inference_mode()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] twice → [B], 0 where they are equal; small pictures are enlarged to what AlexNet takes."""
        maps = zip(self.network(_normalised(a)), self.network(_normalised(b)), self.weights, strict=True)
        total = torch.zeros(len(a))
        for of_a, of_b, weight in maps:
            squared = (_unit(of_a) - _unit(of_b)).square()
            total += (squared * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))
        return total


def _normalised(pixels: Tensor) -> Tensor:
    x = pixels.float() / 127.5 - 1
    if min(x.shape[-2:]) < SMALLEST:
        x = F.interpolate(x, scale_factor=SMALLEST / min(x.shape[-2:]), mode="bilinear")
    return (x - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None]


def _unit(maps: Tensor) -> Tensor:
    """Every place's vector over the channels at unit length."""
    return maps / (maps.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def load_lpips(folder: Path) -> Lpips:
    """LPIPS from the files of a folder, see above.

    Raises:
        ModelNotFoundError: there is no alexnet.safetensors.
        CheckpointError: a file is damaged, or holds other weights.
    """
    network = AlexNetMaps()
    path = folder / "alexnet.safetensors"
    if not path.exists():
        raise ModelNotFoundError(
            f"There is no {path}. Save torchvision's AlexNet (IMAGENET1K_V1) there: its `features.*` weights as "
            "safetensors. Without --lpips the judge's perceptual distance is used."
        )
    with torch.no_grad():
        weights = _load(path)
        for place, conv in zip(PLACES, network.convs, strict=True):
            assert isinstance(conv, nn.Conv2d)
            for name, parameter in conv.named_parameters():
                parameter.copy_(_take(weights, f"features.{place}.{name}", parameter.shape, path))
    network.requires_grad_(False)
    fitted = folder / "lpips.safetensors"
    if fitted.exists():
        linear = _load(fitted)
    else:
        fitted = Path(str(require_torchmetrics().__file__)).parent / "functional/image/lpips_models/alex.pth"
        linear = torch.load(fitted, map_location="cpu", weights_only=True)
    names = [f"lin{index}.model.1.weight" for index in range(len(WIDTHS))]
    shapes = [torch.Size((1, width, 1, 1)) for width in WIDTHS]
    return Lpips(network, [_take(linear, name, s, fitted).flatten() for name, s in zip(names, shapes, strict=True)])


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}. Save it again.") from error


def _take(weights: dict[str, Tensor], name: str, shape: torch.Size, path: Path) -> Tensor:
    tensor = weights.get(name)
    if tensor is None or tensor.shape != shape:
        told = "is missing" if tensor is None else f"is {list(tensor.shape)}"
        raise CheckpointError(
            f"{path}: {name} {told}, expected {list(shape)}; these are not AlexNet's or LPIPS's weights."
        )
    return tensor.float()
