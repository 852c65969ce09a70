"""ER-SDE-Solver: a reverse SDE whose noise follows a law chosen for few steps."""

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor

from octavo.sampling.flow import DEFAULT_SHIFT, off_pure_noise
from octavo.sampling.protocol import Noise, Sampler, check_order

_POINTS = 200  # of the paper's integrals


def er_sde(
    x: Tensor,
    sigmas: list[float],
    *,
    noise: Noise,
    shift: float = DEFAULT_SHIFT,
    order: int = 3,
    law: Literal["extended", "reverse"] = "extended",
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Sampler:
    """Extended reverse-time SDE solver, up to order 3 from earlier answers.

    Works in the noise-to-signal ratio `n = sigma / (1 - sigma)`; of the old noise, the share `scale(n_next) / scale(n)`
    is kept. The paper's integrals over 1 / scale are left Riemann sums of 200 points, in its code and here.

    Args:
        law: which scale: the paper's choice, `n * (exp(n**0.3) + 10)`, or `n**(1 + eta)`, the reverse-time SDE.
        eta: of the latter; 0 is the ODE, 1 the reverse of the forward process.

    Source: Cui et al. 2023 (arXiv 2309.06169), VP ER-SDE-Solver-3.
    """

    def share(n_next: float, n: float) -> float:
        return (n_next / n) ** (1 + eta) if law == "reverse" else _scale(n_next) / _scale(n)

    check_order(order, most=3)
    if len(sigmas) < 2:
        return x
    sigmas = off_pure_noise(sigmas, shift)
    ratios = [sigma / (1 - sigma) for sigma in sigmas]
    denoised_before: Tensor | None = None
    slope_before: Tensor | None = None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        n, n_next = ratios[i], ratios[i + 1]
        kept = share(n_next, n)
        mixed = kept / (1 - sigma) * x + (1 - kept) * denoised  # x / (1 - sigma_next), as all below

        points = [n_next + k * (n - n_next) / _POINTS for k in range(_POINTS)]
        width = (n - n_next) / _POINTS
        slope = None
        if order >= 2 and denoised_before is not None:
            slope = (denoised - denoised_before) / (n - ratios[i - 1])
            integral = width * sum(share(n_next, p) for p in points)
            mixed = mixed + (n_next - n + integral) * slope
        if order >= 3 and slope is not None and slope_before is not None:
            bend = (slope - slope_before) / ((n - ratios[i - 2]) / 2)
            integral = width * sum((p - n) * share(n_next, p) for p in points)
            mixed = mixed + ((n_next - n) ** 2 / 2 + integral) * bend
        fresh = math.sqrt(max(n_next**2 - (kept * n) ** 2, 0.0))
        x = (1 - sigma_next) * (mixed + s_noise * fresh * noise(sigma, sigma_next))
        denoised_before, slope_before = denoised, slope
    return x


def _scale(n: float) -> float:
    return n * (math.exp(n**0.3) + 10)
