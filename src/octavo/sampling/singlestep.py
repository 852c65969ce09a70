"""Deterministic samplers that remember nothing from step to step: Euler, Heun, DPM-Solver.

Each solves `dx / dsigma = velocity(x, sigma)`. Samplers that reuse earlier answers are in `multistep`.
"""

import math
from collections.abc import Generator
from itertools import pairwise

import torch
from torch import Tensor

from octavo.errors import NumericsError
from octavo.sampling.flow import velocity
from octavo.sampling.protocol import Sampler


def euler(x: Tensor, sigmas: list[float]) -> Sampler:
    """Euler steps; Karras et al. 2022 (arXiv 2206.00364), Algorithm 1 without the correction. Order 1.

    On a rectified flow this is DDIM, too.
    """
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        x = x + velocity(x, denoised, sigma) * (sigma_next - sigma)
    return x


def heun(x: Tensor, sigmas: list[float]) -> Sampler:
    """Euler step, then again with the mean of both ends' slopes; Karras et al. 2022, Algorithm 1. Order 2."""
    for sigma, sigma_next in pairwise(sigmas):
        d = velocity(x, (yield x, sigma), sigma)
        x_euler = x + d * (sigma_next - sigma)
        if sigma_next == 0:
            x = x_euler
        else:
            d_next = velocity(x_euler, (yield x_euler, sigma_next), sigma_next)
            x = x + (d + d_next) / 2 * (sigma_next - sigma)
    return x


def heunpp2(x: Tensor, sigmas: list[float]) -> Sampler:
    """Heun++: slopes at this level and the two below it, weighted by their share of the first sigma. Order 1.

    Of k slopes, those ahead weigh `sigma / (k * sigmas[0])` each, so that a step at low noise is almost an Euler step.
    k is 3, and less where fewer levels lie above the last one.

    Source: no paper; made by users of Stable Diffusion from Heun's method in Karras et al. 2022.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        ahead = [level for level in sigmas[i + 1 : i + 3] if level > sigmas[-1]]
        slopes = [velocity(x, (yield x, sigma), sigma)]
        x_ahead = x
        for level_before, level in pairwise([sigma, *ahead]):
            x_ahead = x_ahead + slopes[-1] * (level - level_before)
            slopes.append(velocity(x_ahead, (yield x_ahead, level), level))
        weights = [level / (len(slopes) * sigmas[0]) for level in ahead]
        d = slopes[0] * (1 - sum(weights))
        for weight, slope in zip(weights, slopes[1:], strict=True):
            d = d + weight * slope
        x = x + d * (sigma_next - sigma)
    return x


def dpm_2(x: Tensor, sigmas: list[float]) -> Sampler:
    """Midpoint steps, the midpoint taken in log sigma; Karras et al. 2022 after DPM-Solver-2. Order 2."""
    for sigma, sigma_next in pairwise(sigmas):
        d = velocity(x, (yield x, sigma), sigma)
        if sigma_next > 0:
            sigma_mid = math.sqrt(sigma * sigma_next)
            x_mid = x + d * (sigma_mid - sigma)
            d = velocity(x_mid, (yield x_mid, sigma_mid), sigma_mid)
        x = x + d * (sigma_next - sigma)
    return x


def dpm_fast(x: Tensor, sigmas: list[float]) -> Sampler:
    """DPM-Solver-fast: third-order steps, equal in log sigma, the last one or two of lower order.

    Makes `len(sigmas) - 1` model calls between the first sigma and the last one that is not zero, and stops there:
    choose a schedule that goes low, such as karras or exponential. A single step goes all the way.

    Source: Lu et al. 2022 (arXiv 2206.00927), section 3.4.
    """
    if len(sigmas) <= 2:
        return (yield from euler(x, sigmas))
    budget = len(sigmas) - 1
    steps = budget // 3 + 1
    orders = [3] * (steps - 2) + [2, 1] if budget % 3 == 0 else [3] * (steps - 1) + [budget % 3]
    fall = _last_above_zero(sigmas) / sigmas[0]
    levels = [sigmas[0] * fall ** (k / steps) for k in range(steps + 1)]
    for (sigma, sigma_next), order in zip(pairwise(levels), orders, strict=True):
        if order == 1:
            x = yield from euler(x, [sigma, sigma_next])
        elif order == 2:
            x = yield from dpm_2(x, [sigma, sigma_next])
        else:
            _, x = yield from _dpm_solver_2_and_3(x, sigma, sigma_next)
    return x


def dpm_adaptive(
    x: Tensor,
    sigmas: list[float],
    *,
    first_step: float = 0.05,
    relative_tolerance: float = 0.05,
    absolute_tolerance: float = 0.0078,
    safety: float = 0.81,
) -> Sampler:
    """DPM-Solver-12/23 with adaptive steps: a second-order result beside the third-order one tells the error.

    Steps are chosen in log sigma between the first sigma and the last one that is not zero, where it stops; the
    sigmas between are ignored. The error is one number for the whole tensor.

    Args:
        first_step: tried first, in log sigma.
        relative_tolerance, absolute_tolerance: an error of 1 is the larger of both (the relative one times |x|).
        safety: a step is kept when the next one need not be shorter than this share of it.

    Raises:
        NumericsError: an answer is not finite, so that no step would ever be short enough.

    Source: Lu et al. 2022 (arXiv 2206.00927), appendix; the limit on the step's growth is that of Söderlind and Wang
    2006, "Adaptive time-stepping and computational stability".
    """
    if len(sigmas) <= 2:
        return (yield from euler(x, sigmas))
    sigma, sigma_end = sigmas[0], _last_above_zero(sigmas)
    step = first_step
    x_low_before = x
    while math.log(sigma / sigma_end) > 1e-5:
        sigma_next = max(sigma_end, sigma * math.exp(-step))
        x_low, x_high = yield from _dpm_solver_2_and_3(x, sigma, sigma_next)
        allowed = (relative_tolerance * torch.maximum(x_low.abs(), x_low_before.abs())).clamp(min=absolute_tolerance)
        error = ((x_low - x_high) / allowed).square().mean().sqrt().item()
        if not math.isfinite(error):
            raise NumericsError(
                f"dpm_adaptive was sent an answer with NaN or infinity between sigma {sigma} and {sigma_next}."
            )
        growth = 1 + math.atan((error + 1e-8) ** (-1 / 3) - 1)
        if growth >= safety:
            x, x_low_before, sigma = x_high, x_low, sigma_next
        step *= growth
    return x


def _last_above_zero(sigmas: list[float]) -> float:
    return sigmas[-1] if sigmas[-1] > 0 else sigmas[-2]


def _dpm_solver_2_and_3(
    x: Tensor, sigma: float, sigma_next: float
) -> Generator[tuple[Tensor, float], Tensor, tuple[Tensor, Tensor]]:
    """One step of DPM-Solver-2 and of DPM-Solver-3 from the same three model calls, at thirds of the step in log sigma.

    Source: Lu et al. 2022 (arXiv 2206.00927), Algorithms 1 and 2; sigma * eps there is sigma * velocity here.
    """
    h = math.log(sigma / sigma_next)
    r_1, r_2 = 1 / 3, 2 / 3
    sigma_1, sigma_2 = sigma * math.exp(-r_1 * h), sigma * math.exp(-r_2 * h)

    d = velocity(x, (yield x, sigma), sigma)
    x_1 = x + (sigma_1 - sigma) * d
    d_1 = velocity(x_1, (yield x_1, sigma_1), sigma_1)
    x_2 = x + (sigma_2 - sigma) * d - sigma_2 * r_2 / r_1 * (math.expm1(r_2 * h) / (r_2 * h) - 1) * (d_1 - d)
    d_2 = velocity(x_2, (yield x_2, sigma_2), sigma_2)

    low = x + (sigma_next - sigma) * (d + (d_1 - d) / (2 * r_1))
    high = x + (sigma_next - sigma) * d - sigma_next / r_2 * (math.expm1(h) / h - 1) * (d_2 - d)
    return low, high
