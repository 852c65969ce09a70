"""UniPC: a multistep sampler that corrects every step by the answer that the next step needs anyway."""

import math
from typing import Literal

import torch
from torch import Tensor

from octavo.sampling.exponential import phi
from octavo.sampling.flow import remove_signal_scale
from octavo.sampling.protocol import Sampler, check_order

# Log sigma has no value at 0; ComfyUI stops at 0.001 instead, of which its 1 + sigma**2 in float32 makes 2**-10.
_SIGMA_END, _LAST_STEP_TO = 0.001, 2**-10


def uni_pc(x: Tensor, sigmas: list[float], *, variant: Literal["bh1", "bh2"] = "bh1", order: int = 3) -> Sampler:
    """UniPC-p, multistep, on the denoised estimate, in log sigma.

    Orders rise in the first steps and fall in the last, which is not corrected and holds a whole run at order 2.
    A run down to 0 stops a little above it, and the data's share there is scaled up to 1. Meant for schedules without
    their last but one sigma.

    Args:
        variant: the paper's B(h): `bh1` is h, `bh2` is 1 - exp(-h).
        order: of the predictor, less in short runs.

    Source: Zhao et al. 2023 (arXiv 2302.04867), Algorithms 5 and 6 (data prediction).
    """
    check_order(order, most=4)
    if len(sigmas) < 2:
        return x
    levels = [*sigmas[:-1], sigmas[-1] or min(_LAST_STEP_TO, sigmas[-2] / 2)]
    times = [-math.log(sigma) for sigma in levels]
    steps = len(levels) - 1
    order = min(order, max(steps - 1, 1))

    answers = [(yield x, levels[0])]  # newest first
    for i in range(1, steps + 1):
        p = min(i, order, steps + 1 - i)
        h = times[i] - times[i - 1]
        # Where the earlier answers lie, in steps ahead of the newest; the answer to come lies at 1.
        places = [(times[i - 1 - k] - times[i - 1]) / h for k in range(1, p)]
        slopes = [(answers[k] - answers[0]) / place for k, place in enumerate(places, start=1)]

        euler = levels[i] / levels[i - 1] * x - math.expm1(-h) * answers[0]
        x = euler + _combination(_weights(places, h, variant), slopes)
        if i < steps:
            answer = yield x, levels[i]
            x = euler + _combination(_weights([*places, 1.0], h, variant), [*slopes, answer - answers[0]])
            answers = [answer, *answers][:order]
    if sigmas[-1] > 0:
        return x
    return remove_signal_scale(x, _SIGMA_END if levels[-1] == _LAST_STEP_TO else levels[-1])


def _weights(places: list[float], h: float, variant: str) -> list[float]:
    """What the slopes towards the answers at `places` count: the polynomial through them is integrated exactly.

    A single slope counts B(h) / 2, as the paper allows; this is where its two choices of B(h) differ.
    """
    if len(places) <= 1:
        return [(h if variant == "bh1" else -math.expm1(-h)) / 2] * len(places)
    k = range(1, len(places) + 1)
    powers = torch.tensor([[place ** (j - 1) for place in places] for j in k], dtype=torch.float64)
    moments = torch.tensor([h * math.factorial(j) * phi(j + 1, -h) for j in k], dtype=torch.float64)
    weights: list[float] = torch.linalg.solve(powers, moments).tolist()
    return weights


def _combination(weights: list[float], values: list[Tensor]) -> Tensor | float:
    return sum((weight * value for weight, value in zip(weights, values, strict=True)), start=0.0)
