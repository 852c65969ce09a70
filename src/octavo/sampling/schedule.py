"""Schedules: which noise levels a run visits, from pure noise down to 0.

`schedule` is the way in; the functions behind the names in `SCHEDULES` follow it. They differ in where steps are spent.
Those made for the 1000 levels that a model was trained on (`t` = 0.001, ..., 1.000, shifted) take such levels, unless
there are more steps than levels.

Levels are computed in float32, in the order of operations that ComfyUI uses, and equal its levels to the last bit: an
SDE sampler reads a Brownian path at six decimals of sigma, and which ones these are can hang on that bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from octavo.errors import MissingExtraError, RequestError
from octavo.sampling.flow import DEFAULT_SHIFT, TIMESTEPS, shift_sigma
from octavo.sampling.names import SCHEDULE_ALIASES, look_up

Schedule = Callable[[int, float], Tensor]
"""(steps, shift) -> that many strictly falling levels above 0, the first of them 1."""

MOST_STEPS = 10_000  # of a whole run, of which a small `denoise` walks only the end
MOST_SHIFT = 100.0  # beyond, neighbouring levels near 1 would be equal in float32


def schedule(
    name: str, steps: int, shift: float = DEFAULT_SHIFT, denoise: float = 1.0, discard_penultimate: bool = False
) -> list[float]:
    """The noise levels of a run.

    Args:
        name: one of `SCHEDULES`, or a spelling that `get_schedule` knows.
        steps: how many, at least 1.
        shift: of the model, above 0 and at most 100.
        denoise: the share of the way from pure noise to 0 that is walked, 0 to 1: the last `steps` of
            `int(steps / denoise)` steps. 0 gives no levels at all.
        discard_penultimate: compute one step more and leave out the last level but one, as some samplers ask
            (`SamplerSpec.discard_penultimate`).

    Returns:
        `steps + 1` strictly falling levels that end in 0.0 and, at `denoise` 1, start at 1.0.

    Raises:
        RequestError: unknown name, or a number out of range.
    """
    levels = get_schedule(name)
    if steps < 1:
        raise RequestError(f"steps={steps}: a run needs at least 1 step.")
    if not 0 < shift <= MOST_SHIFT:
        raise RequestError(f"shift={shift}: need a number above 0, at most {MOST_SHIFT}; released SD3.5 models use 3.")
    if not 0 <= denoise <= 1:
        raise RequestError(f"denoise={denoise}: need 0 (leave the picture as it is) to 1 (draw it anew).")
    if denoise == 0:
        return []
    if steps > MOST_STEPS * denoise:
        raise RequestError(
            f"steps={steps} at denoise={denoise} are the end of a run of {int(steps / denoise)} steps; "
            f"at most {MOST_STEPS} are possible. Take fewer steps or a larger denoise."
        )
    total = int(steps / denoise)
    sigmas = levels(total + 1, shift)[:-1] if discard_penultimate else levels(total, shift)
    sigmas[0] = 1.0  # which rounding may have missed by a bit, if shift is not a whole number
    return [*sigmas[-steps:].tolist(), 0.0]


def get_schedule(name: str) -> Schedule:
    """The schedule that `name` stands for, in ComfyUI's spelling or another program's.

    Raises:
        RequestError: no such schedule.
    """
    return look_up("schedule", name, SCHEDULES, SCHEDULE_ALIASES)


def normal(steps: int, shift: float) -> Tensor:
    """Equal steps of the model's timestep from 1000 to its lowest trained one, shifted once more.

    Timesteps are already shifted noise levels, so large shifts crowd the steps at high noise twice. The sigmas of
    diffusers' FlowMatchEulerDiscreteScheduler are these.
    """
    timesteps = torch.linspace(TIMESTEPS, TIMESTEPS * lowest(shift), steps)
    return shift_sigma(timesteps / TIMESTEPS, shift)


def sgm_uniform(steps: int, shift: float) -> Tensor:
    """`normal` with one step more, the last level left out: the step to 0 is as long as the others."""
    return normal(steps + 1, shift)[:-1]


def simple(steps: int, shift: float) -> Tensor:
    """Trained levels at equal distances in t, from the top: 1, 1 - 1/steps, ..."""
    return _trained([TIMESTEPS - _whole(k * (TIMESTEPS / steps), steps) for k in range(steps)], shift)


def ddim_uniform(steps: int, shift: float) -> Tensor:
    """Trained levels at equal distances from the bottom: number 2, then every `1000 // steps`-th; the top one is 1.

    ComfyUI's schedule of this name goes on upwards to the last level that fits: it starts below pure noise, has a step
    too many for 28 steps, and almost no noise at all for one. This one keeps the lowest `steps - 1` of its levels and
    starts at 1. Above 100 steps the distance is not rounded, or none of the steps would fall near the top.
    """
    distance = TIMESTEPS // steps if steps <= 100 else TIMESTEPS / steps
    rising = [_whole(min(2, distance) + k * distance, steps) for k in range(steps - 1)]
    return _trained([TIMESTEPS, *reversed(rising)], shift)


def beta(steps: int, shift: float) -> Tensor:
    """Trained levels at equal quantiles of Beta(0.6, 0.6): dense at both ends.

    Where two quantiles round to one level (from about 100 steps on), none is rounded, so that no step is lost.

    Source: Lee et al. 2024 (arXiv 2407.12173).
    """
    return beta_quantiles(steps, shift, 0.6, 0.6)


def beta_quantiles(steps: int, shift: float, a: float, b: float) -> Tensor:
    """`beta` for any Beta(a, b), both above 0."""
    try:
        from scipy.special import betaincinv
    except ImportError as missing:
        raise MissingExtraError("The beta schedule needs SciPy; run: pip install scipy") from missing
    quantiles: list[float] = betaincinv(a, b, [1 - k / steps for k in range(steps)]).tolist()
    exact = [1 + quantile * (TIMESTEPS - 1) for quantile in quantiles]
    rounded = [round(rank) for rank in exact]
    return _trained(rounded if len(set(rounded)) == steps else exact, shift)


def karras(steps: int, shift: float) -> Tensor:
    """Equal steps of sigma to the power of 1/7; Karras et al. 2022 (arXiv 2206.00364), equation 5."""
    low = lowest(shift) ** (1 / 7)
    roots: Tensor = 1 + torch.linspace(0, 1, steps) * (low - 1)
    return roots**7


def exponential(steps: int, shift: float) -> Tensor:
    """Equal steps of log sigma."""
    return torch.linspace(0, math.log(lowest(shift)), steps).exp()


def kl_optimal(steps: int, shift: float) -> Tensor:
    """Equal steps of arctan sigma; Sabour et al. 2024 (arXiv 2404.14507).

    One step starts at 1, as everywhere (ComfyUI divides 0 by 0 there).
    """
    u = torch.arange(steps) / max(steps - 1, 1)
    return (u * math.atan(lowest(shift)) + (1 - u) * math.atan(1)).tan()


def linear_quadratic(steps: int, _shift: float) -> Tensor:
    """Half of the steps equal and small, down to 0.975; from there a parabola to 0. Knows no shift.

    Source: Polyak et al. 2024 (arXiv 2410.13720), "Movie Gen".
    """
    half, threshold = max(steps // 2, 1), 0.025
    k = torch.arange(steps, dtype=torch.float64)
    bend = (1 - threshold * steps / half) / max(steps - half, 1) ** 2
    return (1 - threshold * k / half - bend * (k - half).clamp(min=0) ** 2).float()


_IN_ORDER = (simple, sgm_uniform, karras, exponential, ddim_uniform, beta, normal, linear_quadratic, kl_optimal)
SCHEDULES: Mapping[str, Schedule] = MappingProxyType({levels.__name__: levels for levels in _IN_ORDER})
"""All schedules by name, in ComfyUI's order."""


def _trained(ranks: Sequence[float], shift: float) -> Tensor:
    """The trained levels number `ranks` of 1000, counted from the lowest as 1; between two of them for fractions."""
    # Fractions need float64, or close ones would be equal.
    dtype = torch.float32 if all(isinstance(rank, int) for rank in ranks) else torch.float64
    return shift_sigma(torch.tensor(ranks, dtype=dtype) / TIMESTEPS, shift)


def lowest(shift: float) -> float:
    """The lowest level that the model was trained on."""
    return _trained([1], shift).item()


def _whole(rank: float, steps: int) -> float:
    """`rank` rounded down to a trained level, but for more steps than there are levels."""
    return int(rank) if steps <= TIMESTEPS else rank
