"""A flow whose exact solution is known: data drawn from N(0, 0.5**2).

At level sigma the mixture has the variance `0.25 * (1 - sigma)**2 + sigma**2`. The best estimate of the data is linear
in x, and the flow only scales: x divided by the mixture's deviation never changes. So noise x ends as 0.5 x.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from octavo.sampling import Guided, SamplerSpec, sample

DATA_DEVIATION = 0.5


def deviation(sigma: float) -> float:
    """Of the mixture at `sigma`."""
    return math.hypot(DATA_DEVIATION * (1 - sigma), sigma)


def denoise(x: Tensor, sigma: float) -> Tensor:
    """The mean of the data, given the mixture `x`."""
    return x * DATA_DEVIATION**2 * (1 - sigma) / deviation(sigma) ** 2


def denoise_guided(x: Tensor, sigma: float) -> Guided:
    """The same for CFG++ samplers, with both predictions equal: no guidance."""
    return Guided(denoise(x, sigma), denoise(x, sigma))


def geometric(start: float, end: float, steps: int) -> list[float]:
    """Levels equally spaced in log sigma."""
    return [start * (end / start) ** (k / steps) for k in range(steps + 1)]


def result_deviation(spec: SamplerSpec, sigmas: list[float]) -> float:
    """Deviation of what a stochastic sampler returns, over all noise it could draw; exact.

    The flow is linear, so a run is carried out on coefficients: the start is one basis vector, each independent piece
    of noise another, and the result's variance the sum of squares.
    """
    answer = denoise_guided if spec.needs_uncond else denoise
    drawn: list[tuple[float, float]] = []

    def record(sigma: float, sigma_next: float) -> Tensor:
        drawn.append((sigma, sigma_next))
        return torch.zeros((), dtype=torch.float64)

    sample(spec(torch.zeros((), dtype=torch.float64), sigmas, noise=record), answer)
    levels = sorted({level for pair in drawn for level in pair})
    dimensions = 1 + (len(drawn) if spec.stochastic == "default" else len(levels))
    count = 0

    def basis(sigma: float, sigma_next: float) -> Tensor:
        nonlocal count
        count += 1
        noise = torch.zeros(dimensions, dtype=torch.float64)
        if spec.stochastic == "default":
            noise[count] = 1
        else:  # a Brownian path: pieces between levels are independent, draws that overlap share them
            for k, (low, high) in enumerate(pairwise(levels), start=1):
                if sigma_next <= low and high <= sigma:
                    noise[k] = -math.sqrt((high - low) / (sigma - sigma_next))
        return noise

    x = torch.zeros(dimensions, dtype=torch.float64)
    x[0] = deviation(sigmas[0])
    return sample(spec(x, sigmas, noise=basis), answer).norm().item()
