"""Rectified flow: how data and noise mix, and the quantities that describe a mixture.

Between data and noise SD3.5 draws straight lines: `x = (1 - sigma) * data + sigma * noise`. Everything that follows
from that equation alone is here; which sigmas to visit is `schedule`'s business, how to walk them the samplers'.

Two other coordinates are used by samplers that come from elsewhere:

- half the log of the signal-to-noise ratio, `lambda = log((1 - sigma) / sigma)`: solvers of the DPM-Solver family
  are exact in it but for the denoised estimate's change.
- the variance-exploding (VE) picture of a mixture, `x / (1 - sigma)`: data plus noise of level `sigma / (1 - sigma)`.

Source: Liu et al. 2022 (arXiv 2209.03003); Esser et al. 2024 (arXiv 2403.03206) for SD3.
"""

import math
from typing import TypeVar

from torch import Tensor

Level = float | Tensor
"""A noise level: one for all of a tensor, or a tensor of shape [B] with one per row."""

LevelT = TypeVar("LevelT", float, Tensor)

TIMESTEPS = 1000  # what the released models call pure noise
DEFAULT_SHIFT = 3.0  # of every released SD3 and SD3.5 model


def add_noise(latents: Tensor, noise: Tensor, sigma: Level) -> Tensor:
    """Mix `latents` with `noise` of the same shape: `sigma` 0 gives the latents, 1 the noise."""
    level = _per_row(sigma, latents)
    return (1 - level) * latents + level * noise


def remove_signal_scale(x: Tensor, sigma: float) -> Tensor:
    """`x` stopped at `sigma` < 1, divided by the data's share in it: clean data keep their size.

    What ComfyUI hands on when a run ends with noise left; `x` itself where `sigma` is 0.
    """
    return x / (1 - sigma)


def velocity(x: Tensor, denoised: Tensor, sigma: Level) -> Tensor:
    """`dx / dsigma` that leads from `x` to `denoised`, for `sigma` > 0; the inverse of `denoised_from_velocity`."""
    return (x - denoised) / _per_row(sigma, x)


def denoised_from_velocity(x: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
    """The clean latents that the model's raw output `velocity` at (`x`, `sigma`) points to."""
    return x - _per_row(sigma, x) * velocity


def timestep(sigma: LevelT) -> LevelT:
    """What the model is told: `1000 * sigma`."""
    return TIMESTEPS * sigma


def shift_sigma(sigma: LevelT, shift: float) -> LevelT:
    """Spend more steps at high noise, as larger pictures need.

    Args:
        sigma: noise levels in [0, 1], any shape.
        shift: 1 leaves `sigma` as it is; the released SD3.5 models use 3.

    Returns:
        Shifted levels, same shape; 0 and 1 stay where they are.

    Source: Esser et al. 2024 (arXiv 2403.03206), resolution-dependent shifting.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: float, shift: float) -> float:
    """The inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def percent_to_sigma(percent: float, shift: float = DEFAULT_SHIFT) -> float:
    """Noise level after the fraction `percent` of the training timesteps: 0 is pure noise (1.0), 1 is clean (0.0).

    Settings such as "from .01 to .20 of the steps" are turned into sigmas by this, whatever the schedule.
    """
    return shift_sigma(1 - min(max(percent, 0.0), 1.0), shift)


def log_snr(sigma: float) -> float:
    """`lambda = log((1 - sigma) / sigma)`, half the log of the signal-to-noise ratio; infinite at 0 and 1."""
    if sigma <= 0:
        return math.inf
    if sigma >= 1:
        return -math.inf
    return math.log1p(-sigma) - math.log(sigma)


def sigma_from_log_snr(log_snr: float) -> float:
    """The inverse of `log_snr`."""
    if log_snr < 0:  # so that exp never overflows
        return 1 / (1 + math.exp(log_snr))
    return math.exp(-log_snr) / (1 + math.exp(-log_snr))


def off_pure_noise(sigmas: list[float], shift: float) -> list[float]:
    """The same sigmas, the first a little below 1 if it was 1, where lambda would be infinite.

    Args:
        sigmas: falling noise levels.
        shift: of the model; the first level becomes the one after a 10 000th of the training timesteps.

    Returns:
        A list as long as `sigmas`, still falling, however close to 1 its second level is.
    """
    if len(sigmas) < 2 or sigmas[0] < 1:
        return sigmas
    first = percent_to_sigma(1e-4, shift)
    if first <= sigmas[1]:
        first = (1 + sigmas[1]) / 2
    return [first, *sigmas[1:]]


def _per_row(sigma: Level, like: Tensor) -> Level:
    """`sigma`, with a tensor [B] spread over the other axes of `like` [B, ...]."""
    if isinstance(sigma, Tensor) and sigma.dim() == 1:
        return sigma.reshape(-1, *[1] * (like.dim() - 1))
    return sigma
