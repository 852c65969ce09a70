"""Schedules: which noise levels a run visits, from pure noise down to 0.

`schedule` is the way in; the functions behind the names in `SCHEDULES` follow it. They differ in where steps are spent.
Those made for the 1000 levels that a model was trained on (`t` = 0.001, ..., 1.000, shifted) round to such a level,
unless there are more steps than levels.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from octavo.errors import MissingExtraError, RequestError
from octavo.sampling.flow import DEFAULT_SHIFT, TIMESTEPS, shift_sigma
from octavo.sampling.names import SCHEDULE_ALIASES, look_up

Schedule = Callable[[int, float], list[float]]
"""(steps, shift) -> that many strictly falling levels above 0, the first of them 1."""

MOST_STEPS = 100_000  # of a whole run, of which a small `denoise` walks only the end


def schedule(
    name: str, steps: int, shift: float = DEFAULT_SHIFT, denoise: float = 1.0, discard_penultimate: bool = False
) -> list[float]:
    """The noise levels of a run.

    Args:
        name: one of `SCHEDULES`, or a spelling that `get_schedule` knows.
        steps: how many, at least 1.
        shift: of the model, above 0.
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
    if not (shift > 0 and math.isfinite(shift)):
        raise RequestError(f"shift={shift}: need a number above 0; the released SD3.5 models use 3.")
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
    return [*sigmas, 0.0][-(steps + 1) :]


def get_schedule(name: str) -> Schedule:
    """The schedule that `name` stands for, in ComfyUI's spelling or another program's.

    Raises:
        RequestError: no such schedule.
    """
    return look_up("schedule", name, SCHEDULES, SCHEDULE_ALIASES)


def normal(steps: int, shift: float) -> list[float]:
    """Equal steps of the model's timestep from 1000 to its lowest trained one, shifted once more.

    Timesteps are already shifted noise levels, so large shifts crowd the steps at high noise twice. The sigmas of
    diffusers' FlowMatchEulerDiscreteScheduler are these.
    """
    low = _lowest(shift)
    return [shift_sigma(1 + u * (low - 1), shift) for u in _ramp(steps)]


def sgm_uniform(steps: int, shift: float) -> list[float]:
    """`normal` with one step more, the last level left out: the step to 0 is as long as the others."""
    return normal(steps + 1, shift)[:-1]


def simple(steps: int, shift: float) -> list[float]:
    """Trained levels at equal distances in t, from the top: 1, 1 - 1/steps, ..."""
    return [_trained(TIMESTEPS - _whole(k * (TIMESTEPS / steps), steps), shift) for k in range(steps)]


def ddim_uniform(steps: int, shift: float) -> list[float]:
    """Trained levels at equal distances from the bottom: number 2, then every `1000 // steps`-th; the top one is 1.

    ComfyUI's schedule of this name goes on upwards to the last level that fits: it starts below pure noise, has a step
    too many for 28 steps, and almost no noise at all for one. This one keeps the lowest `steps - 1` of its levels and
    starts at 1. Above 100 steps the distance is not rounded, or none of the steps would fall near the top.
    """
    distance = TIMESTEPS // steps if steps <= 100 else TIMESTEPS / steps
    rising = [_trained(_whole(min(2, distance) + k * distance, steps), shift) for k in range(steps - 1)]
    return [1.0, *reversed(rising)]


def beta(steps: int, shift: float) -> list[float]:
    """Trained levels at equal quantiles of Beta(0.6, 0.6): dense at both ends.

    Where two quantiles round to one level (from about 100 steps on), none is rounded, so that no step is lost.

    Source: Lee et al. 2024 (arXiv 2407.12173), section 4.
    """
    try:
        from scipy.special import betaincinv
    except ImportError as missing:
        raise MissingExtraError("The beta schedule needs SciPy; run: pip install scipy") from missing
    quantiles = [float(betaincinv(0.6, 0.6, 1 - k / steps)) * (TIMESTEPS - 1) for k in range(steps)]
    rounded = [round(quantile) for quantile in quantiles]
    return [_trained(1 + at, shift) for at in (rounded if len(set(rounded)) == steps else quantiles)]


def karras(steps: int, shift: float) -> list[float]:
    """Equal steps of sigma to the power of 1/7; Karras et al. 2022 (arXiv 2206.00364), equation 5."""
    low = _lowest(shift) ** (1 / 7)
    return [(1 + u * (low - 1)) ** 7 for u in _ramp(steps)]


def exponential(steps: int, shift: float) -> list[float]:
    """Equal steps of log sigma."""
    return [_lowest(shift) ** u for u in _ramp(steps)]


def kl_optimal(steps: int, shift: float) -> list[float]:
    """Equal steps of arctan sigma; Sabour et al. 2024 (arXiv 2404.14507), section 3.1.

    One step starts at 1, as everywhere (ComfyUI divides 0 by 0 there).
    """
    high, low = math.atan(1.0), math.atan(_lowest(shift))
    return [1.0, *(math.tan(high + u * (low - high)) for u in _ramp(steps)[1:])]


def linear_quadratic(steps: int, _shift: float) -> list[float]:
    """Half of the steps equal and small, down to 0.975; from there a parabola to 0. Knows no shift.

    Source: Polyak et al. 2024 (arXiv 2410.13720), "Movie Gen", section 3.4.2.
    """
    if steps == 1:
        return [1.0]
    half, threshold = steps // 2, 0.025
    bend = (1 - threshold * steps / half) / (steps - half) ** 2
    return [1 - threshold * k / half - bend * max(k - half, 0) ** 2 for k in range(steps)]


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        f.__name__: f
        for f in (
            simple,
            sgm_uniform,
            karras,
            exponential,
            ddim_uniform,
            beta,
            normal,
            linear_quadratic,
            kl_optimal,
        )
    }
)
"""All schedules by name, in ComfyUI's order."""


def _trained(rank: float, shift: float) -> float:
    """The level that was number `rank` of the 1000 trained ones, counted from the lowest as 1."""
    return shift_sigma(rank / TIMESTEPS, shift)


def _lowest(shift: float) -> float:
    return _trained(1, shift)


def _whole(rank: float, steps: int) -> float:
    """`rank` rounded down to a trained level, but for more steps than there are levels."""
    return int(rank) if steps <= TIMESTEPS else rank


def _ramp(steps: int) -> list[float]:
    """0 to 1 in so many values; 0 alone for one."""
    return [k / (steps - 1) if k else 0.0 for k in range(steps)]
