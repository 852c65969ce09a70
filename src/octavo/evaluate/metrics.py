"""How far two pictures, or two sets of pictures, are apart: the numbers alone.

    psnr, ssim          of two pictures with the same seed
    relative_error      of two tensors: latents, velocities, layer outputs
    cosine_score        of pictures and their prompts, as CLIP score counts
    fid, cmmd           of two sets of pictures, by their features
    resampled, spread   how much such a number would change with other prompts

What gives the features is `features`' business. PSNR, SSIM and FID are torchmetrics'.

N and M pictures of two sets, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from octavo.errors import MissingExtraError, RequestError

if TYPE_CHECKING:
    from types import ModuleType

# Equal pictures have no finite PSNR. One level in one channel of one pixel of a 4096×4096 picture has 125 dB; what is
# above this is equal to any eye, and a mean over pictures must stay finite.
MOST_DECIBELS = 100.0
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # as published


def require_torchmetrics() -> ModuleType:
    """torchmetrics, imported.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import torchmetrics
    except ImportError as missing:
        raise MissingExtraError("torchmetrics is not installed; run: pip install 'octavo[eval]'") from missing
    return torchmetrics


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two pictures, in dB, at most `MOST_DECIBELS`.

    Args:
        a: uint8 [3, H, W].
        b: the same shape.
    """
    require_torchmetrics()
    from torchmetrics.functional.image import peak_signal_noise_ratio

    decibels = peak_signal_noise_ratio(_unit(a), _unit(b), data_range=1.0)
    return min(float(decibels), MOST_DECIBELS)


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two pictures, 1 where they are equal; Wang et al. 2004, Gaussian window of 11 pixels.

    Args:
        a: uint8 [3, H, W].
        b: the same shape.
    """
    require_torchmetrics()
    from torchmetrics.functional.image import structural_similarity_index_measure

    if torch.equal(a, b):
        return 1.0
    # In float32: the window slides over every pixel, and in float64 that takes a minute for a picture of 1024×1024.
    # Its rounding is 1e-6 as a rule, and 3e-5 where all is flat.
    value = structural_similarity_index_measure(_unit(a).float(), _unit(b).float(), data_range=1.0)
    assert isinstance(value, Tensor)
    return float(value)


def squared_error(a: Tensor, b: Tensor) -> float:
    """Mean squared error of two uint8 pictures, with white as 1."""
    return float((_unit(a) - _unit(b)).square().mean())


def decibels(mean_squared_error: float) -> float:
    """PSNR of a mean squared error, with white as 1; at most `MOST_DECIBELS`."""
    return min(MOST_DECIBELS, -10 * math.log10(mean_squared_error)) if mean_squared_error > 0 else MOST_DECIBELS


def _unit(pixels: Tensor) -> Tensor:
    """uint8 [3, H, W] → float64 [1, 3, H, W] in [0, 1]: in float32 the means of large pictures lose digits."""
    return (pixels.double() / 255)[None]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, over that of `wanted`; 0 for equal tensors, also where both are zero."""
    difference = (got.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm()) if difference else 0.0


def cosine_score(pictures: Tensor, texts: Tensor) -> Tensor:
    """100 times the cosine of every picture with its own text, at least 0; Hessel et al. 2021 (arXiv 2104.08718).

    Args:
        pictures: [N, D] of unit length.
        texts: [N, D] of unit length.

    Returns:
        [N].
    """
    return 100 * (pictures * texts).sum(dim=1).clamp(min=0)


class _Features(nn.Module):
    """Hands on features that are computed already, to a metric that wants a network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


class FidTo:
    """Fréchet distance of sets of features to one that stays; Heusel et al. 2017 (arXiv 1706.08500).

    By torchmetrics, in float64.

    Args:
        real: [N, D], of the set that stays.

    Raises:
        RequestError: it has fewer than two.
    """

    def __init__(self, real: Tensor) -> None:
        require_torchmetrics()
        from torchmetrics.image.fid import FrechetInceptionDistance

        _need_two(real)
        self._metric = FrechetInceptionDistance(feature=_Features(real.shape[1]), reset_real_features=False)
        self._metric.update(real.double(), real=True)

    def __call__(self, made: Tensor) -> float:
        """The distance of `made` [M, D].

        Raises:
            RequestError: it has fewer than two.
        """
        _need_two(made)
        self._metric.reset()
        self._metric.update(made.double(), real=False)
        # Rounding leaves equal sets a hair beside 0.
        return max(0.0, float(self._metric.compute()))


def _need_two(features: Tensor) -> None:
    if len(features) < 2:
        raise RequestError(f"FID needs at least two pictures on each side, here is {len(features)} on one.")


def fid(real: Tensor, made: Tensor) -> float:
    """Fréchet distance of two sets of features, [N, D] and [M, D]; see `FidTo`."""
    return FidTo(real)(made)


def cmmd(real: Tensor, made: Tensor) -> float:
    """Maximum mean discrepancy of two sets of features; Jayasumana et al. 2024 (arXiv 2401.09603).

    As in the authors' code: features of unit length, a Gaussian kernel of σ = 10, all pairs with themselves included,
    times 1000.

    Args:
        real: [N, D] of unit length.
        made: [M, D] of unit length.
    """
    real, made = real.double(), made.double()
    distance = _kernel(real, real) + _kernel(made, made) - 2 * _kernel(real, made)
    return max(0.0, CMMD_SCALE * distance)


def _kernel(a: Tensor, b: Tensor) -> float:
    squared = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    return float((-squared / (2 * CMMD_SIGMA**2)).exp().mean())


def resampled(statistic: Callable[[Tensor], float], count: int, *, resamples: int, seed: int = 0) -> Tensor:
    """A statistic over bootstrap draws: what it might have been by the luck of the prompts.

    Two sets' values are of the same draws where count and seed are equal, so that what the sets have in common cancels
    in their ratio.

    Args:
        statistic: of chosen rows [count], some of them repeated.
        count: rows there are.
        resamples: draws with replacement.
        seed: of the draws.

    Returns:
        [resamples] float64.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(count, (count,), generator=generator) for _ in range(resamples)]
    return torch.tensor([statistic(rows) for rows in draws], dtype=torch.float64)


def spread(values: Tensor) -> tuple[float, float]:
    """The 5th and 95th percentile."""
    low, high = values.quantile(torch.tensor([0.05, 0.95], dtype=values.dtype)).tolist()
    return low, high
