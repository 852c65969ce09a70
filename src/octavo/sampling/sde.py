"""Samplers of the reverse SDE in lambda: exponential integrators that draw noise inside the step.

Over a step of length `h` in `lambda = log((1 - sigma) / sigma)` a sampler keeps `sigma_next / sigma * exp(-eta * h)`
of x, replaces the noise that it dropped by fresh noise, and integrates the denoised estimate; `eta` is 0 for the ODE
and 1 for the reverse of the forward process. The samplers differ in how they model the estimate along the step.

Lambda is infinite at pure noise, so a first sigma of 1 is lowered a little (`flow.off_pure_noise`), by an amount that
depends on the model's shift. ER-SDE, whose noise follows a law of its own, is in `er_sde`; SA-Solver in `sa_solver`.
"""

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor

from octavo.sampling.ancestral import ve_ancestral_step
from octavo.sampling.exponential import phi
from octavo.sampling.flow import DEFAULT_SHIFT, log_snr, off_pure_noise, sigma_from_log_snr
from octavo.sampling.protocol import Noise, Sampler


def _exponential_euler(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, eta: float) -> Tensor:
    """The step's deterministic part, exact where the estimate stays `denoised` all along."""
    h = log_snr(sigma_next) - log_snr(sigma)
    kept = sigma_next / sigma * math.exp(-eta * h)
    return kept * x - (1 - sigma_next) * math.expm1(-(1 + eta) * h) * denoised


def _slope_weight(h: float, eta: float, rule: str) -> float:
    """What a change of the estimate by 1 over the step adds to x / (1 - sigma_next).

    `midpoint` takes the change at mid-step for the whole step, `exact` integrates the line.
    """
    z = (1 + eta) * h
    return z * phi(2, -z) if rule == "exact" else -math.expm1(-z) / 2


def _renewed(h: float, eta: float) -> float:
    """Deviation of the noise drawn over a step of length `h`, in units of its last sigma."""
    return math.sqrt(-math.expm1(-2 * eta * h))


def dpmpp_2m_sde(
    x: Tensor,
    sigmas: list[float],
    *,
    noise: Noise,
    shift: float = DEFAULT_SHIFT,
    eta: float = 1.0,
    s_noise: float = 1.0,
    rule: Literal["midpoint", "exact"] = "midpoint",
) -> Sampler:
    """SDE-DPM-Solver++(2M): the estimate follows a line through its last two values.

    Args:
        rule: how the line is integrated: `midpoint` takes its value at mid-step throughout.

    Source: Lu et al. 2022 (arXiv 2211.01095), section 5 and appendix B.
    """
    sigmas = off_pure_noise(sigmas, shift)
    denoised_before, h_before = None, 0.0
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        h = log_snr(sigma_next) - log_snr(sigma)
        x = _exponential_euler(x, denoised, sigma, sigma_next, eta)
        if denoised_before is not None:
            change = (denoised - denoised_before) * (h / h_before)
            x = x + (1 - sigma_next) * _slope_weight(h, eta, rule) * change
        x = x + noise(sigma, sigma_next) * (s_noise * sigma_next * _renewed(h, eta))
        denoised_before, h_before = denoised, h
    return x


def dpmpp_3m_sde(
    x: Tensor,
    sigmas: list[float],
    *,
    noise: Noise,
    shift: float = DEFAULT_SHIFT,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Sampler:
    """DPM-Solver++(3M) SDE: the estimate follows a parabola through its last three values.

    The parabola's bend counts half of its integral, as in k-diffusion, where this sampler was first published.

    Source: Lu et al. 2022 (arXiv 2211.01095), carried on to three steps.
    """
    sigmas = off_pure_noise(sigmas, shift)
    past: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        past = [denoised, *past][:3]
        h = log_snr(sigma_next) - log_snr(sigma)
        z = (1 + eta) * h
        x = _exponential_euler(x, denoised, sigma, sigma_next, eta)
        # Earlier steps' lengths in units of this one, so that slopes are per step.
        lengths = [(log_snr(sigmas[i - k]) - log_snr(sigmas[i - k - 1])) / h for k in range(len(past) - 1)]
        slopes = [(past[k] - past[k + 1]) / length for k, length in enumerate(lengths)]
        if len(slopes) == 1:
            x = x + (1 - sigma_next) * z * phi(2, -z) * slopes[0]
        elif len(slopes) == 2:
            bend = (slopes[0] - slopes[1]) / (lengths[0] + lengths[1])
            slope = slopes[0] + lengths[0] * bend
            x = x + (1 - sigma_next) * z * (phi(2, -z) * slope + phi(3, -z) * bend)
        x = x + noise(sigma, sigma_next) * (s_noise * sigma_next * _renewed(h, eta))
    return x


def dpmpp_sde(
    x: Tensor,
    sigmas: list[float],
    *,
    noise: Noise,
    shift: float = DEFAULT_SHIFT,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 1 / 2,
) -> Sampler:
    """SDE-DPM-Solver++(2S), as k-diffusion's dpmpp_sde: a call at the fraction `r` of the step, then the whole step.

    Both parts are ancestral steps of `x / (1 - sigma)`; they share one Brownian path through `noise`.

    Source: Lu et al. 2022 (arXiv 2211.01095), Algorithm 1 with appendix B's noise.
    """

    def ancestral(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
        signal, signal_next = 1 - sigma, 1 - sigma_next
        step = ve_ancestral_step(sigma / signal, sigma_next / signal_next, eta)
        kept = step.down / (sigma / signal)
        mean = signal_next / signal * kept * x + signal_next * (1 - kept) * denoised
        return mean + noise(sigma, sigma_next) * (s_noise * signal_next * step.up)

    sigmas = off_pure_noise(sigmas, shift)
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        sigma_mid = _part_of_step(sigma, sigma_next, r)
        denoised_mid = yield ancestral(x, denoised, sigma, sigma_mid), sigma_mid
        x = ancestral(x, denoised + (denoised_mid - denoised) / (2 * r), sigma, sigma_next)
    return x


def seeds_2(
    x: Tensor,
    sigmas: list[float],
    *,
    noise: Noise,
    shift: float = DEFAULT_SHIFT,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 1 / 2,
    rule: Literal["midpoint", "exact"] = "midpoint",
) -> Sampler:
    """SEEDS-2: a call at the fraction `r` of the step gives the estimate's slope. Order 2 at eta 0.

    With `r` = 1 and the `exact` rule it is the exponential Heun method on the denoised estimate. Noise is drawn for
    either part of the step.

    Source: Gonzalez et al. 2023 (arXiv 2305.14267), Algorithm 2 on the data prediction.
    """
    sigmas = off_pure_noise(sigmas, shift)
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        h = log_snr(sigma_next) - log_snr(sigma)
        sigma_1 = _part_of_step(sigma, sigma_next, r)
        drawn = _renewed(r * h, eta) * noise(sigma, sigma_1)
        x_1 = _exponential_euler(x, denoised, sigma, sigma_1, eta) + s_noise * sigma_1 * drawn
        change = ((yield x_1, sigma_1) - denoised) / r

        drawn = _carried(drawn, (1 - r) * h, eta, noise(sigma_1, sigma_next))
        x = _exponential_euler(x, denoised, sigma, sigma_next, eta) + s_noise * sigma_next * drawn
        x = x + (1 - sigma_next) * _slope_weight(h, eta, rule) * change
    return x


def exp_heun_2_x0(x: Tensor, sigmas: list[float], *, shift: float = DEFAULT_SHIFT) -> Sampler:
    """The exponential Heun method on the denoised estimate in lambda: `seeds_2` without noise. Order 2.

    Source: Hochbruck and Ostermann 2010, "Exponential integrators", section 2; Lu et al. 2022 (arXiv 2211.01095).
    """
    silence = x.new_zeros(())
    return (yield from seeds_2(x, sigmas, noise=lambda *_: silence, shift=shift, eta=0.0, r=1.0, rule="exact"))


def seeds_3(
    x: Tensor,
    sigmas: list[float],
    *,
    noise: Noise,
    shift: float = DEFAULT_SHIFT,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
) -> Sampler:
    """SEEDS-3: calls at the fractions `r_1` and `r_2` of the step, noise drawn for each part. Order 3 at eta 0.

    Source: Gonzalez et al. 2023 (arXiv 2305.14267), Algorithm 3 on the data prediction.
    """
    sigmas = off_pure_noise(sigmas, shift)
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        h = log_snr(sigma_next) - log_snr(sigma)
        sigma_1, sigma_2 = _part_of_step(sigma, sigma_next, r_1), _part_of_step(sigma, sigma_next, r_2)

        drawn = _renewed(r_1 * h, eta) * noise(sigma, sigma_1)
        x_1 = _exponential_euler(x, denoised, sigma, sigma_1, eta) + s_noise * sigma_1 * drawn
        change = ((yield x_1, sigma_1) - denoised) / r_1

        drawn = _carried(drawn, (r_2 - r_1) * h, eta, noise(sigma_1, sigma_2))
        x_2 = _exponential_euler(x, denoised, sigma, sigma_2, eta) + s_noise * sigma_2 * drawn
        x_2 = x_2 + (1 - sigma_2) * _slope_weight(r_2 * h, eta, "exact") * r_2 * change
        change = ((yield x_2, sigma_2) - denoised) / r_2

        drawn = _carried(drawn, (1 - r_2) * h, eta, noise(sigma_2, sigma_next))
        x = _exponential_euler(x, denoised, sigma, sigma_next, eta) + s_noise * sigma_next * drawn
        x = x + (1 - sigma_next) * _slope_weight(h, eta, "exact") * change
    return x


def _part_of_step(sigma: float, sigma_next: float, r: float) -> float:
    """The level at the fraction `r` of a step in lambda."""
    if r == 1:
        return sigma_next
    return sigma_from_log_snr((1 - r) * log_snr(sigma) + r * log_snr(sigma_next))


def _carried(drawn: Tensor, h: float, eta: float, fresh: Tensor) -> Tensor:
    """Noise `drawn` before, in units of the sigma then, as it is after a further `h`, with `fresh` noise added."""
    return math.exp(-eta * h) * drawn + _renewed(h, eta) * fresh
