"""Deterministic samplers that reuse the answers of earlier steps: one model call a step, higher order.

The first step has no past and is an Euler step, so no global order above 2 can be seen over a whole run.
UniPC, which also corrects each step by the next answer, is in `unipc`.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from octavo.sampling.exponential import phi
from octavo.sampling.flow import velocity
from octavo.sampling.protocol import Sampler, check_order
from octavo.sampling.quadrature import interpolation_weights


def lms(x: Tensor, sigmas: list[float], *, order: int = 4) -> Sampler:
    """Linear multistep: Adams-Bashforth for unequal steps, the slope interpolated in sigma.

    Source: Hairer, Nørsett, Wanner, "Solving Ordinary Differential Equations I", section III.5.
    """
    check_order(order, most=8)
    return (yield from _adams_bashforth(x, sigmas, order, coordinate=lambda sigma: sigma))


def deis(x: Tensor, sigmas: list[float], *, order: int = 3) -> Sampler:
    """DEIS in its time-Adams-Bashforth form: the slope is interpolated in the time of a variance-preserving diffusion.

    Source: Zhang and Chen 2022 (arXiv 2204.13902), tAB-DEIS; the time is that of Song et al. 2021 (arXiv 2011.13456)
    with the beta range that takes sigma from 0.002 to 80.
    """
    check_order(order, most=4)
    return (yield from _adams_bashforth(x, sigmas, order, coordinate=_variance_preserving_time))


def _adams_bashforth(x: Tensor, sigmas: list[float], order: int, coordinate: Callable[[float], float]) -> Sampler:
    """Follow the polynomial in `coordinate(sigma)` through the last `order` slopes."""
    slopes: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        slopes = [velocity(x, denoised, sigma), *slopes][:order]
        known_at = [sigmas[i - k] for k in range(len(slopes))]
        x = x + _weighted(interpolation_weights(known_at, sigma, sigma_next, coordinate=coordinate), slopes)
    return x


def _variance_preserving_time(sigma: float) -> float:
    """The time t in [0, 1] at which `log(1 + sigma**2)` is `beta_d / 2 * t**2 + beta_min * t`."""
    beta_min, beta_d = _BETA
    return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(sigma**2)) - beta_min) / beta_d


def _beta_range(sigma_min: float, sigma_max: float, time_min: float) -> tuple[float, float]:
    """`beta_min` and `beta_d` that put `sigma_min` at `time_min` and `sigma_max` at time 1."""
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (high - low / time_min) / (1 - time_min)
    return high - beta_d / 2, beta_d


_BETA = _beta_range(sigma_min=0.002, sigma_max=80.0, time_min=1e-3)

# Adams-Bashforth for equal steps: what the newest slope, the one before it, ... count.
_EQUAL_STEPS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm(x: Tensor, sigmas: list[float], *, order: int = 4) -> Sampler:
    """Improved pseudo numerical method: Adams-Bashforth with the weights of equal steps, whatever the steps are.

    Source: Zhang and Chen 2022 (arXiv 2204.13902), iPNDM, after Liu et al. 2022 (arXiv 2202.09778).
    """
    check_order(order, most=len(_EQUAL_STEPS))
    slopes: list[Tensor] = []
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        slopes = [velocity(x, denoised, sigma), *slopes][:order]
        x = x + (sigma_next - sigma) * _weighted(_EQUAL_STEPS[len(slopes) - 1], slopes)
    return x


def ipndm_v(x: Tensor, sigmas: list[float], *, order: int = 4) -> Sampler:
    """`ipndm` with weights that follow the lengths of the steps.

    Source: Zhou et al. 2023 (arXiv 2312.00094), the solver iPNDM-v in the code beside the paper.
    """
    check_order(order, most=4)
    slopes: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        slopes = [velocity(x, denoised, sigma), *slopes][:order]
        lengths = [sigmas[i - k + 1] - sigmas[i - k] for k in range(len(slopes))]
        x = x + (sigma_next - sigma) * _weighted(_ipndm_v_weights(lengths), slopes)
    return x


def _ipndm_v_weights(lengths: list[float]) -> list[float]:
    """What each slope counts, newest first, given the lengths of this step and of those before it.

    The weights of the second and third differences are those of the authors' code. For unequal steps they are not
    quite the exact integrals, which `lms` has; the pictures people know are made with these.
    """
    if len(lengths) == 1:
        return [1.0]
    h, h_1 = lengths[:2]
    weights = [1 + h / (2 * h_1), -h / (2 * h_1)]
    if len(lengths) == 2:
        return weights
    h_2 = lengths[2]
    second = (1 - h**2 / (3 * h_1 * (h_1 + h_2))) / 2
    a = h_1 / h_2
    weights = [w + second * c for w, c in zip([*weights, 0.0], (1, -1 - a, a), strict=True)]
    if len(lengths) == 3:
        return weights
    h_3 = lengths[3]
    stretch = h * (h + h_1) * (h + h_1 + h_2) / (h_1 * (h_1 + h_2) * (h_1 + h_2 + h_3))
    third = stretch * ((1 - h / (3 * (h + h_1))) / 2 + (1 - h / (2 * (h + h_1))) * h / (6 * (h + h_1 + h_2)))
    b = h_1 * (h_1 + h_2) / (h_2 * (h_2 + h_3))
    cubic = (1, -1 - a - b, a + b * (1 + h_2 / h_3), -a * b)
    return [w + third * c for w, c in zip([*weights, 0.0], cubic, strict=True)]


def dpmpp_2m(x: Tensor, sigmas: list[float]) -> Sampler:
    """DPM-Solver++(2M): exact in log sigma but for the denoised estimate, which follows a line. Order 2.

    Source: Lu et al. 2022 (arXiv 2211.01095), Algorithm 2.
    """
    denoised_before, h_before = None, 0.0
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        estimate = denoised
        if denoised_before is not None:
            estimate = denoised + h / (2 * h_before) * (denoised - denoised_before)
        x = sigma_next / sigma * x + (1 - sigma_next / sigma) * estimate
        denoised_before, h_before = denoised, h
    return x


def gradient_estimation(x: Tensor, sigmas: list[float], *, gamma: float = 2.0) -> Sampler:
    """Euler along the slope pushed on by its own change, as gradient descent with a better estimate of the gradient.

    Args:
        gamma: 1 is Euler; the paper's choice is 2.

    Source: Permenter and Yuan 2023 (arXiv 2306.04848).
    """
    d_before = None
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        d = velocity(x, denoised, sigma)
        d_estimate = d if d_before is None else gamma * d + (1 - gamma) * d_before
        x = x + d_estimate * (sigma_next - sigma)
        d_before = d
    return x


def res_multistep(x: Tensor, sigmas: list[float]) -> Sampler:
    """RES, multistep: `dpmpp_2m` with the line through the last two estimates integrated exactly. Order 2.

    Source: Zhang et al. 2023 (arXiv 2308.02157), Refined Exponential Solver.
    """
    denoised_before, place = None, 0.0
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        x = res_step(x, denoised, denoised_before, sigma, sigma_next, place=place)
        denoised_before, place = denoised, math.log(sigma_next / sigma)
    return x


def res_step(
    x: Tensor, denoised: Tensor, denoised_before: Tensor | None, sigma: float, sigma_next: float, *, place: float
) -> Tensor:
    """One step of RES to `sigma_next` > 0; an Euler step where there is no earlier estimate.

    Args:
        place: where the earlier estimate lies on the scale of -log sigma, this one being at 0.
    """
    h = math.log(sigma / sigma_next)
    x = sigma_next / sigma * x + (1 - sigma_next / sigma) * denoised
    if denoised_before is None:
        return x
    return x + h**2 * phi(2, -h) / place * (denoised_before - denoised)


def _weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """The weighted sum of tensors of one shape."""
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total
