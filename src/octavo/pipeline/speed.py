"""Speed levels: evaluations of the model that are forecast from those before, where that is safe enough.

The guided velocity of a run changes smoothly from step to step. Where a line through its last two values foretold the
latest one well, the line answers in place of the model: no block is computed, no ControlNet, no weight is moved. How
well it foretold, scaled to how far ahead it now has to reach, is an estimate of the error; a level says how much of it
may add up before the model is asked again. So each run spends its evaluations where its velocity bends, and a run whose
velocity jumps, as those of samplers that draw much noise, is evaluated throughout.

A `Forecast` belongs to one run and leaves with it; it holds three velocities of the latents' size, nothing of the
model's. What is foretold is the guided answer of a whole question, so that prompt and negative prompt stay in step.

Sources: Liu et al. 2024 (arXiv 2411.19108), TeaCache, and ParaAttention's first-block cache for skipping evaluations by
their accumulated change; Liu et al. 2025 (arXiv 2503.06923), TaylorSeer, for forecasting instead of keeping; the error
estimate is that of multistep methods for differential equations. `docs/decisions/0014` has what was measured.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.errors import RequestError, did_you_mean
from octavo.pipeline.denoise import Question
from octavo.sampling import Guided

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How much closeness to the exact picture is given for time."""

    name: str
    tolerance: float  # relative error of the velocity that may add up between two evaluations; 0: none is forecast
    most: int = 0  # evaluations forecast in a row


EXACT = Speed(name="exact", tolerance=0.0)
SPEEDS: Mapping[str, Speed] = {
    speed.name: speed
    for speed in (
        EXACT,
        Speed(name="balanced", tolerance=0.08, most=2),
        Speed(name="fast", tolerance=0.3, most=3),
    )
}


def speed_called(name: str) -> Speed:
    """The level of this name.

    Raises:
        RequestError: there is none.
    """
    if not isinstance(name, str) or name not in SPEEDS:
        known = ", ".join(SPEEDS)
        raise RequestError(f"speed {name!r:.60}: choose {known}.{did_you_mean(str(name), SPEEDS)}")
    return SPEEDS[name]


class _Known(NamedTuple):
    """What the model said."""

    sigma: float
    velocity: Tensor  # of x, as guided
    uncond: Tensor | None  # of samplers that want it too


class Forecast:
    """The evaluations of one run, made or forecast."""

    def __init__(self, speed: Speed, total: int) -> None:
        """Begin.

        Args:
            total: evaluations of the run, of which the last is always made.
        """
        self.speed, self.total = speed, total
        self._known: list[_Known] = []  # the last three, at falling levels
        self._asked: tuple[object, ...] = ()  # what the model was asked to heed
        self._error = float("inf")  # of the latest, relative, had it been forecast from the two before
        self._spent, self._in_a_row = 0.0, 0

    @classmethod
    def of(cls, speed: Speed, total: int) -> "Forecast | None":
        """For a run of `total` evaluations; None where nothing can be forecast.

        Args:
            total: 0 where the sampler chooses its levels as it goes.
        """
        if not speed.tolerance:
            return None
        if not total:
            logger.info("The sampler chooses its steps as it goes: speed '%s' forecasts nothing of it.", speed.name)
            return None
        return cls(speed, total)

    def answer(self, question: Question, done: int) -> Guided | None:
        """The answer that is foretold; None where the model has to be asked.

        Args:
            done: evaluations before this one.
        """
        sigma = question.sigma
        if len(self._known) < 3 or done + 1 >= self.total or self._in_a_row >= self.speed.most:
            return None
        if not 0 < sigma < self._known[-1].sigma or question.heeds != self._asked:
            return None
        before, first, last = self._known
        # The error of a line grows as the distances to both of its points; it was measured at `last`, ahead of the two.
        reach = (last.sigma - sigma) * (first.sigma - sigma)
        measured = (first.sigma - last.sigma) * (before.sigma - last.sigma)
        error = self._error * reach / measured
        if not self._spent + error < self.speed.tolerance:
            return None
        self._spent, self._in_a_row = self._spent + error, self._in_a_row + 1
        ahead = (sigma - last.sigma) / (last.sigma - first.sigma)
        denoised = question.x - sigma * torch.lerp(first.velocity, last.velocity, 1 + ahead)
        if first.uncond is None or last.uncond is None:
            return Guided(denoised, denoised)
        return Guided(denoised, question.x - sigma * torch.lerp(first.uncond, last.uncond, 1 + ahead))

    def learn(self, question: Question, guided: Guided) -> None:
        """Take up what the model said."""
        x, sigma = question.x, question.sigma
        self._spent, self._in_a_row = 0.0, 0
        if sigma <= 0:
            return
        uncond = (x - guided.uncond) / sigma if question.needs_uncond else None
        known = _Known(sigma, (x - guided.denoised) / sigma, uncond)
        if question.heeds != self._asked or (self._known and sigma > self._known[-1].sigma):
            self._known = []
        elif self._known and sigma == self._known[-1].sigma:  # the second of two looks at one level is the better one
            self._known.pop()
        self._asked = question.heeds
        if len(self._known) >= 2:
            self._error = _surprise(self._known[-2], self._known[-1], known)
        self._known = [*self._known[-2:], known]


def _surprise(first: _Known, last: _Known, now: _Known) -> float:
    """By how much a line through the two missed the third, relative to it; the worst picture counts."""
    ahead = (now.sigma - last.sigma) / (last.sigma - first.sigma)
    missed = (torch.lerp(first.velocity, last.velocity, 1 + ahead) - now.velocity).flatten(1).norm(dim=1)
    size = now.velocity.flatten(1).norm(dim=1)
    worst: float = (missed / size.clamp_min(torch.finfo(size.dtype).tiny)).max().item()
    return worst
