"""Nodes that make and edit noise levels.

A rectified flow's levels lie between 0 and 1. Some of these nodes were made for models with others, and their defaults
say so: set sigma_max to 1 for SD3.5. A sampler refuses levels that it cannot walk, so they are not checked here.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes.types import ModelLink, Sigmas
from octavo.graph.spec import BOOLEAN, COMBO, FLOAT, INT, LINK, NodeSpec, node
from octavo.sampling import SCHEDULES, percent_to_sigma, schedule
from octavo.sampling.flow import shift_sigma
from octavo.sampling.schedule import MOST_STEPS, beta_quantiles, lowest

_MODULE = "comfy_extras.nodes_custom_sampler"
_SCHEDULERS = "sampling/custom_sampling/schedulers"
_SIGMAS = "sampling/custom_sampling/sigmas"
_STEPS = INT(20, min=1, max=10000)
_HIGH = FLOAT(14.614642, min=0.0, max=5000.0, step=0.01, round=False)
_LOW = FLOAT(0.0291675, min=0.0, max=5000.0, step=0.01, round=False)
_SPLIT = (("SIGMAS", "high_sigmas"), ("SIGMAS", "low_sigmas"))

_UNLIKE_0 = 0.0001  # what a flipped schedule starts from, for nothing can be told from a level of 0


@node(
    "BasicScheduler",
    module=_MODULE,
    category=_SCHEDULERS,
    description="The levels that KSampler walks.",
    inputs={
        "model": LINK("MODEL"),
        "scheduler": COMBO(tuple(SCHEDULES)),
        "steps": _STEPS,
        "denoise": FLOAT(1.0, min=0.0, max=1.0, step=0.01),
    },
    outputs=("SIGMAS",),
)
def basic_scheduler(_context: Context, model: ModelLink, scheduler: str, steps: int, denoise: float) -> tuple[Sigmas]:
    """A schedule by name, for the model's shift; see `sampling.schedule`."""
    return (tuple(schedule(scheduler, steps, shift=model.shift, denoise=denoise)),)


@node(
    "SDTurboScheduler",
    module=_MODULE,
    category=_SCHEDULERS,
    description="The levels that SD Turbo was trained at: every hundredth of a thousand timesteps.",
    inputs={
        "model": LINK("MODEL"),
        "steps": INT(1, min=1, max=10),
        "denoise": FLOAT(1.0, min=0, max=1.0, step=0.01),
    },
    outputs=("SIGMAS",),
)
def sd_turbo_scheduler(_context: Context, model: ModelLink, steps: int, denoise: float) -> tuple[Sigmas]:
    """Of timesteps 999, 899 … 99 the first `steps`, from `denoise` on, shifted as the model's are; then 0."""
    first = 10 - int(10 * denoise)
    timesteps = range(999, 0, -100)[first : first + steps]
    return ((*(_float32(shift_sigma(t / 1000, model.shift)) for t in timesteps), 0.0),)


@node(
    "KarrasScheduler",
    module=_MODULE,
    category=_SCHEDULERS,
    description="Equal steps of the rho-th root of sigma. For SD3.5 set sigma_max to 1.",
    inputs={
        "steps": _STEPS,
        "sigma_max": _HIGH,
        "sigma_min": _LOW,
        "rho": FLOAT(7.0, min=0.0, max=100.0, step=0.01, round=False),
    },
    outputs=("SIGMAS",),
)
def karras_scheduler(_context: Context, steps: int, sigma_max: float, sigma_min: float, rho: float) -> tuple[Sigmas]:
    """Karras et al. 2022 (arXiv 2206.00364), equation 5."""
    _above_0(rho=rho)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    roots: Tensor = high + torch.linspace(0, 1, steps) * (low - high)
    return (_ending(roots**rho),)


@node(
    "ExponentialScheduler",
    module=_MODULE,
    category=_SCHEDULERS,
    description="Equal steps of log sigma. For SD3.5 set sigma_max to 1.",
    inputs={"steps": _STEPS, "sigma_max": _HIGH, "sigma_min": _LOW},
    outputs=("SIGMAS",),
)
def exponential_scheduler(_context: Context, steps: int, sigma_max: float, sigma_min: float) -> tuple[Sigmas]:
    """A straight line in log sigma."""
    _above_0(sigma_max=sigma_max, sigma_min=sigma_min)
    return (_ending(torch.linspace(math.log(sigma_max), math.log(sigma_min), steps).exp()),)


@node(
    "PolyexponentialScheduler",
    module=_MODULE,
    category=_SCHEDULERS,
    description="Steps of log sigma along the rho-th power of a line. For SD3.5 set sigma_max to 1.",
    inputs={
        "steps": _STEPS,
        "sigma_max": _HIGH,
        "sigma_min": _LOW,
        "rho": FLOAT(1.0, min=0.0, max=100.0, step=0.01, round=False),
    },
    outputs=("SIGMAS",),
)
def polyexponential_scheduler(
    _context: Context, steps: int, sigma_max: float, sigma_min: float, rho: float
) -> tuple[Sigmas]:
    """`exponential_scheduler` at rho 1; more time at low noise above that."""
    _above_0(sigma_max=sigma_max, sigma_min=sigma_min, rho=rho)
    share = torch.linspace(1, 0, steps) ** rho
    return (_ending((share * math.log(sigma_max / sigma_min) + math.log(sigma_min)).exp()),)


@node(
    "LaplaceScheduler",
    module=_MODULE,
    category=_SCHEDULERS,
    description="Levels at equal quantiles of a Laplace distribution of log sigma, cut off at both ends. It ends at "
    "sigma_min, not at 0. For SD3.5 set sigma_max to 1.",
    inputs={
        "steps": _STEPS,
        "sigma_max": _HIGH,
        "sigma_min": _LOW,
        "mu": FLOAT(0.0, min=-10.0, max=10.0, step=0.1, round=False),
        "beta": FLOAT(0.5, min=0.0, max=10.0, step=0.1, round=False),
    },
    outputs=("SIGMAS",),
)
def laplace_scheduler(
    _context: Context, steps: int, sigma_max: float, sigma_min: float, mu: float, beta: float
) -> tuple[Sigmas]:
    """Hang et al. 2024 (arXiv 2407.03297), "Improved Noise Schedule for Diffusion Training".

    Raises:
        RequestError: sigma_min is above sigma_max.
    """
    if sigma_min > sigma_max:
        raise RequestError(f"sigma_min {sigma_min} is above sigma_max {sigma_max}; exchange them.")
    off_centre = 0.5 - torch.linspace(0, 1, steps)
    # The ends of the distribution are infinitely far away; as in ComfyUI, they are taken a little inside of it.
    distance = -(1 - 2 * off_centre.abs() + 1e-5).log()
    levels = (mu + beta * off_centre.sign() * distance).exp().clamp(min=sigma_min, max=sigma_max)
    return (tuple(levels.tolist()),)


@node(
    "BetaSamplingScheduler",
    module=_MODULE,
    category=_SCHEDULERS,
    description="The schedule beta with other parameters: below 1 they crowd the steps at both ends.",
    inputs={
        "model": LINK("MODEL"),
        "steps": _STEPS,
        "alpha": FLOAT(0.6, min=0.0, max=50.0, step=0.01, round=False),
        "beta": FLOAT(0.6, min=0.0, max=50.0, step=0.01, round=False),
    },
    outputs=("SIGMAS",),
)
def beta_sampling_scheduler(
    _context: Context, model: ModelLink, steps: int, alpha: float, beta: float
) -> tuple[Sigmas]:
    """Trained levels at equal quantiles of Beta(alpha, beta); see `sampling.schedule.beta`."""
    _above_0(alpha=alpha, beta=beta)
    return (_ending(beta_quantiles(steps, model.shift, alpha, beta)),)


@node(
    "SplitSigmas",
    module=_MODULE,
    category=_SIGMAS,
    description="The first steps, and the rest.",
    inputs={"sigmas": LINK("SIGMAS"), "step": INT(0, min=0, max=10000)},
    outputs=_SPLIT,
)
def split_sigmas(_context: Context, sigmas: Sigmas, step: int) -> tuple[Sigmas, Sigmas]:
    """Cut at the level number `step`, which both parts hold."""
    return sigmas[: step + 1], sigmas[step:]


@node(
    "SplitSigmasDenoise",
    module=_MODULE,
    category=_SIGMAS,
    description="The last part of the steps, denoise of them, and what comes before.",
    inputs={"sigmas": LINK("SIGMAS"), "denoise": FLOAT(1.0, min=0.0, max=1.0, step=0.01)},
    outputs=_SPLIT,
)
def split_sigmas_denoise(_context: Context, sigmas: Sigmas, denoise: float) -> tuple[Sigmas, Sigmas]:
    """Cut so that `denoise` of the steps are in the second part.

    At `denoise` 0 the first part has all steps. (ComfyUI gives it none, as if nothing had been asked for.)
    """
    steps = max(len(sigmas) - 1, 0)
    cut = steps - round(steps * denoise)
    return sigmas[: cut + 1], sigmas[cut:]


@node(
    "FlipSigmas",
    module=_MODULE,
    category=_SIGMAS,
    description="The levels in reverse, to go from a picture back to noise.",
    inputs={"sigmas": LINK("SIGMAS")},
    outputs=("SIGMAS",),
)
def flip_sigmas(_context: Context, sigmas: Sigmas) -> tuple[Sigmas]:
    """Rising levels; a first level of 0 becomes 0.0001."""
    flipped = sigmas[::-1]
    if flipped and flipped[0] == 0:
        flipped = (_float32(_UNLIKE_0), *flipped[1:])
    return (flipped,)


@node(
    "SetFirstSigma",
    module=_MODULE,
    category=_SIGMAS,
    description="Another first level; for SD3.5 from 0 to 1.",
    inputs={"sigmas": LINK("SIGMAS"), "sigma": FLOAT(136.0, min=0.0, max=20000.0, step=0.001, round=False)},
    outputs=("SIGMAS",),
)
def set_first_sigma(_context: Context, sigmas: Sigmas, sigma: float) -> tuple[Sigmas]:
    """The levels with the first one replaced.

    Raises:
        RequestError: there is none.
    """
    if not sigmas:
        raise RequestError("There are no sigmas whose first one could be set; was denoise 0?")
    return ((_float32(sigma), *sigmas[1:]),)


@node(
    "ExtendIntermediateSigmas",
    module=_MODULE,
    category=_SIGMAS,
    description="Each step between two levels becomes several.",
    inputs={
        "sigmas": LINK("SIGMAS"),
        "steps": INT(2, min=1, max=100),
        "start_at_sigma": FLOAT(-1.0, min=-1.0, max=20000.0, step=0.01, round=False),
        "end_at_sigma": FLOAT(12.0, min=0.0, max=20000.0, step=0.01, round=False),
        "spacing": COMBO(("linear", "cosine", "sine")),
    },
    outputs=("SIGMAS",),
    search_aliases=("interpolate sigmas",),
)
def extend_intermediate_sigmas(
    _context: Context, sigmas: Sigmas, steps: int, start_at_sigma: float, end_at_sigma: float, spacing: str
) -> tuple[Sigmas]:
    """Steps that begin between `start_at_sigma` (below 0: anywhere) and `end_at_sigma` are cut into `steps`.

    `spacing` says how they are cut: evenly, first wide and then narrow (cosine), or the other way round (sine).

    Raises:
        RequestError: more steps than a run can have.
    """
    if (len(sigmas) - 1) * steps > MOST_STEPS:
        raise RequestError(
            f"steps {steps}: there would be up to {(len(sigmas) - 1) * steps} levels; {MOST_STEPS} will do."
        )
    highest = start_at_sigma if start_at_sigma >= 0 else math.inf
    shares = [k / steps for k in range(1, steps)]
    if spacing == "cosine":
        shares = [math.sin(share * math.pi / 2) for share in shares]
    elif spacing == "sine":
        shares = [1 - math.cos(share * math.pi / 2) for share in shares]
    extended: list[float] = []
    for sigma, sigma_next in pairwise(sigmas):
        extended.append(sigma)
        if end_at_sigma <= sigma <= highest:
            extended += [_float32(sigma + share * (sigma_next - sigma)) for share in shares]
    return ((*extended, *sigmas[-1:]),)


@node(
    "SamplingPercentToSigma",
    module=_MODULE,
    category=_SIGMAS,
    description="The level after a share of the way from noise (0) to the picture (1).",
    inputs={
        "model": LINK("MODEL"),
        "sampling_percent": FLOAT(0.0, min=0.0, max=1.0, step=0.0001),
        "return_actual_sigma": BOOLEAN(False, tooltip="At 1, give the lowest trained level instead of 0."),
    },
    outputs=(("FLOAT", "sigma_value"),),
)
def sampling_percent_to_sigma(
    _context: Context, model: ModelLink, sampling_percent: float, return_actual_sigma: bool
) -> tuple[float]:
    """What "start at percent" settings mean for this model's shift."""
    if return_actual_sigma and sampling_percent == 1:
        return (lowest(model.shift),)
    return (percent_to_sigma(sampling_percent, model.shift),)


def _ending(levels: Tensor) -> Sigmas:
    """`levels`, then 0."""
    return (*levels.float().tolist(), 0.0)


def _float32(sigma: float) -> float:
    """As schedules have it: what an SDE sampler draws can hang on the last bit."""
    return torch.tensor(sigma, dtype=torch.float32).item()


def _above_0(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise RequestError(f"{name} {value}: need a number above 0.")


NODES: tuple[NodeSpec, ...] = (
    basic_scheduler,
    karras_scheduler,
    exponential_scheduler,
    polyexponential_scheduler,
    laplace_scheduler,
    beta_sampling_scheduler,
    split_sigmas,
    split_sigmas_denoise,
    flip_sigmas,
    set_first_sigma,
    extend_intermediate_sigmas,
    sampling_percent_to_sigma,
)
