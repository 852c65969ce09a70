"""One walk of a sampler from noise to data, apart from who asks the model.

A `Run` says all that a walk needs, a `Walk` is one under way: it holds a question, is given the answer, and so on to
its result. `solve` is the plain loop, one run alone; an engine that answers the questions of many walks at once has
the same signature, so those who want latents need not know which of them serves.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.devices import whole_processor
from octavo.errors import NumericsError, RequestError
from octavo.fp8 import all_finite
from octavo.models import MMDiT
from octavo.pipeline.denoise import Question, Track, make_tables
from octavo.pipeline.finite import Late, denoise_finite
from octavo.pipeline.latents import FACTOR
from octavo.pipeline.sparing import Smaller, nothing_to_give, sparing
from octavo.pipeline.speed import EXACT, Forecast, Speed
from octavo.pipeline.tables import Tables
from octavo.sampling import Guided, SamplerSpec, initial_noise
from octavo.sampling.flow import add_noise
from octavo.sampling.noise import SEEDS, for_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inpaint:
    """What of a picture is kept: the model sees it under noise at every level, and its estimate there is the picture.

    Source: ComfyUI's sampling with a latent noise mask.
    """

    mask: Tensor  # [1 or B, 1, h, w] in [0, 1]; 1 = draw anew
    latents: Tensor  # [B, 16, h, w] of the picture
    noise: Tensor  # [B, 16, h, w], that which the run starts from

    def question(self, x: Tensor, sigma: float) -> Tensor:
        """`x` with the kept part at its level of noise."""
        return x * self.mask + add_noise(self.latents, self.noise, sigma) * (1 - self.mask)

    def answer(self, denoised: Tensor) -> Tensor:
        """The estimate with the kept part as it is."""
        return denoised * self.mask + self.latents * (1 - self.mask)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """All that a walk needs but the model's answers."""

    mmdit: Callable[[], MMDiT]  # gives the model, loaded; asked before each evaluation
    track: Track
    sampler: SamplerSpec
    sigmas: Sequence[float]  # falling; fewer than two make no step
    x: Tensor  # [B, 16, h, w] float32, mixed with noise at the first sigma, on the model's device
    seed: int  # of the noise that the sampler draws
    inpaint: Inpaint | None = None
    retry_bf16: bool = False  # see `finite.denoise_finite`
    speed: Speed = EXACT
    smaller: Smaller = nothing_to_give  # asked where memory is short, before an evaluation is tried again


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """How far a run is."""

    done: int  # evaluations, of the model or forecast
    total: int  # in all; 0 where the sampler chooses as it goes
    denoised: Tensor | None = None  # the estimate [B, 16, h, w] of the last evaluation; None before the first
    forecast: int = 0  # evaluations that did not ask the model, see `speed`


Watch = Callable[[Step], None]
"""Told of the start of a run and after every evaluation of the model; what it raises stops the run."""

Solve = Callable[[Run, Watch], Tensor]
"""From a run to the latents [B, 16, h, w] it ends in: the seam between who wants them and who owns the device.

Raises what `watch` raises, and NumericsError.
"""


def solve(run: Run, watch: Watch, *, cache: Tables | None = None, late: bool | None = None) -> Tensor:
    """The plain loop: one run alone.

    Args:
        watch: called in between evaluations.
        cache: for tables of modulation that outlive the run.
        late: look at an answer's soundness when the next step is under way, see `finite.Late`; None: on CUDA devices,
            which work by themselves, unless an answer may have to be made anew.

    Returns:
        What the sampler ends in, [B, 16, h, w] like `run.x`.

    Raises:
        NumericsError: the model or the sampler gave NaN or infinity.
        OutOfMemoryError: memory does not suffice, whatever `run.smaller` gave up.
        RequestError: a condition's area lies outside of the latents.
    """
    with torch.inference_mode(), whole_processor():
        height, width = (FACTOR * side for side in run.x.shape[-2:])
        what = f"a picture of {width}x{height} pixels"
        wanted = run.x.device.type == "cuda" if late is None else late
        checks = Late() if wanted and not run.retry_bf16 else None
        walk = sparing(lambda: Walk(run, cache=cache), run.smaller, what)
        watch(walk.step)
        while (question := walk.question) is not None:
            ask = partial(_ask, run, question, walk.step.done + 1, checks)
            walk.answer(sparing(ask, run.smaller, what))
            watch(walk.step)
        if checks is not None:
            checks.settle(run.mmdit())
        return walk.result


def _ask(run: Run, question: Question, evaluation: int, checks: Late | None) -> Guided:
    if checks is not None:
        return checks.ask(run.mmdit(), question, evaluation=evaluation)
    return denoise_finite(run.mmdit(), question, evaluation=evaluation, retry_bf16=run.retry_bf16)


class Walk:
    """A run under way, for those who answer its questions; used inside torch.inference_mode.

    Attributes:
        run: what is walked.
        question: to be answered next; None at the end.
        step: how far it is. Evaluations that are forecast pass by: the question is always one for the model.
    """

    def __init__(self, run: Run, *, cache: Tables | None = None) -> None:
        """Make the tables of all steps, and the first question.

        Raises:
            RequestError: a condition's area lies outside of the latents.
        """
        self.run = run
        self.step = Step(0, 0)
        self.question: Question | None = None
        self._result: Tensor | None = run.x
        if len(run.sigmas) < 2:
            return
        mmdit, sampler, sigmas = run.mmdit(), run.sampler, run.sigmas
        weight = mmdit.x_embedder.proj.weight
        self._track = run.track.to(weight.device, weight.dtype)
        calls = [] if sampler.adaptive else sampler.calls(sigmas, shift=run.track.shift)
        guided = [Question(run.x, sigma, self._track, sampler.needs_uncond).passes for sigma in calls]
        make_tables(mmdit, self._track, calls, negative=any("uncond" in passes for passes in guided), cache=cache)
        self.step = Step(0, len(calls))
        self._forecast = Forecast.of(run.speed, len(calls))
        noise = for_run(sampler, run.x, sigmas, run.seed)
        self._sampler = sampler(run.x, sigmas, noise=noise, shift=run.track.shift)
        self._advance(lambda: next(self._sampler))

    def answer(self, guided: Guided) -> None:
        """Go on with the answer to `question`, to the next one for the model or to the result."""
        question = self.question
        assert question is not None, "the run is over"
        if self._forecast is None:
            self._take(guided)
            return
        self._forecast.learn(question, guided)
        self._take(guided)
        while (question := self.question) is not None:
            foretold = self._forecast.answer(question, self.step.done)
            if foretold is None:
                return
            self._take(foretold, forecast=1)
        name, self._forecast = self.run.speed.name, None
        logger.info("%d of %d evaluations were forecast (speed '%s').", self.step.forecast, self.step.done, name)

    def _take(self, guided: Guided, *, forecast: int = 0) -> None:
        denoised = guided.denoised
        if self.run.inpaint is not None:
            denoised = self.run.inpaint.answer(denoised)
        self.step = Step(self.step.done + 1, self.step.total, denoised, self.step.forecast + forecast)
        needs_uncond = self.run.sampler.needs_uncond
        reply = Guided(denoised, guided.uncond) if needs_uncond else denoised
        self._advance(lambda: self._sampler.send(reply))

    @property
    def result(self) -> Tensor:
        """What the sampler ended in, [B, 16, h, w].

        Raises:
            NumericsError: NaN or infinity came from the sampler's own formulas.
        """
        assert self.question is None, "the run is still under way"
        assert self._result is not None
        if not all_finite(self._result):
            raise NumericsError(
                f"The sampler {self.run.sampler.name} gave NaN or infinity at the noise levels of this run; "
                "try another sampler or another schedule."
            )
        return self._result

    def _advance(self, move: Callable[[], Any]) -> None:
        try:
            x, sigma = move()
        except StopIteration as end:
            self.question, self._result = None, end.value
            return
        if self.run.inpaint is not None:
            x = self.run.inpaint.question(x, sigma)
        self.question = Question(x, sigma, self._track, self.run.sampler.needs_uncond)


def inpaint_noise(sampler: SamplerSpec, noise: Tensor, seed: int) -> Tensor:
    """The noise under which `Inpaint` hides what is kept: the run's own; for `ddim` other noise, of the next seed.

    Args:
        noise: [B, ...], what the run starts from.
        seed: of the run.

    Source: ComfyUI, where ddim is euler with inpainting noise of its own.
    """
    if sampler.name != "ddim":
        return noise
    return initial_noise(noise.shape, (seed + 1) % SEEDS).to(noise)


def stretch(sigmas: Sequence[float], first: int = 0, last: int | None = None, *, to_zero: bool = False) -> list[float]:
    """The levels of the steps from number `first` up to, not including, number `last`, as KSamplerAdvanced takes them.

    Args:
        first: counts from 0; none are left where it is beyond the last step.
        last: None, or beyond the end, for all that follow.
        to_zero: whether a run that stops early leaves no noise: its last level becomes 0.

    Returns:
        Falling levels, one more than steps; fewer than two where there is nothing to do.

    Raises:
        RequestError: a negative number.
    """
    if first < 0 or (last is not None and last < 0):
        raise RequestError(f"steps from {first} to {last}: they are counted from 0.")
    levels = list(sigmas)
    if last is not None and last < len(levels) - 1:
        levels = levels[: last + 1]
        if to_zero:
            levels[-1] = 0.0
    return levels[first:] if first < len(levels) - 1 else []
