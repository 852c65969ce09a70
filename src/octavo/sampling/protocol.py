"""What a sampler is: a generator that yields `(x, sigma)`, is sent the model's estimate, and returns the last x.

    sampler = euler(x, sigmas)            nothing is computed yet
    x, sigma = next(sampler)              the first question
    x, sigma = sampler.send(denoised)     the answer, and the next question; StopIteration carries the result

So the caller owns the loop: it may batch the questions of many samplers, preview, pause or cancel. `sample` below is
the plain loop. `SamplerSpec` says of each algorithm what a caller must know before it starts; the table of all of
them is in `samplers`.
"""

import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from octavo.errors import RequestError, did_you_mean
from octavo.sampling.flow import DEFAULT_SHIFT


class Guided(NamedTuple):
    """The answer that CFG++ samplers need."""

    denoised: Tensor  # with guidance
    uncond: Tensor  # what the negative prompt alone gives, same shape


Sampler = Generator[tuple[Tensor, float], Tensor, Tensor]
"""Yields (x, sigma), is sent denoised (like x), returns the last x."""

GuidedSampler = Generator[tuple[Tensor, float], Guided, Tensor]
"""The same for CFG++: is sent `Guided`."""

Noise = Callable[[float, float], Tensor]
"""Fresh standard normal noise like x, for the step from the first sigma down to the second."""

Option = float | int | str
Answer = TypeVar("Answer", Tensor, Guided)


def sample(
    sampler: Generator[tuple[Tensor, float], Answer, Tensor], denoise: Callable[[Tensor, float], Answer]
) -> Tensor:
    """Run `sampler` to its end, asking `denoise(x, sigma)` whatever it asks."""
    advance: Callable[[], tuple[Tensor, float]] = partial(next, sampler)
    while True:
        try:
            x, sigma = advance()
        except StopIteration as end:
            result: Tensor = end.value
            return result
        advance = partial(sampler.send, denoise(x, sigma))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSpec:
    """A sampler by name: call it to start a run; its fields say what the run needs.

    A run keeps its state in its generator. Rows of a batch never mix, but in `adaptive` samplers, whose step size
    follows the error of the whole tensor.
    """

    name: str
    steps: Callable[..., Generator[tuple[Tensor, float], Any, Tensor]]  # the algorithm
    paper: str
    stochastic: Literal["none", "default", "brownian"] = "none"  # the kind of noise it draws, see `noise`
    needs_uncond: bool = False  # is sent `Guided` instead of a tensor
    needs_shift: bool = False  # wants the model's shift
    discard_penultimate: bool = False  # meant for a schedule of one step more without its last but one sigma
    adaptive: bool = False  # chooses its own sigmas as it goes
    options: dict[str, Option] = field(default_factory=dict, hash=False)  # for `steps`, in place of its defaults

    def __call__(
        self, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None, shift: float = DEFAULT_SHIFT
    ) -> Generator[tuple[Tensor, float], Any, Tensor]:
        """Start a run.

        Args:
            x: latents mixed with noise at `sigmas[0]`, any shape, floating point.
            sigmas: falling levels in [0, 1]; fewer than two make no step.
            noise: draws for the steps, see `noise.for_run`; samplers that need none ignore it.
            shift: of the model.

        Returns:
            A generator that yields `(x, sigma)`, is sent denoised (`Guided` where `needs_uncond`) and returns x at
            the last sigma. Drop it at any time.

        Raises:
            RequestError: the sampler draws noise and none is given.
        """
        settings: dict[str, Any] = dict(self.options)
        if self.stochastic != "none":
            if noise is None:
                raise RequestError(f"The sampler {self.name} draws noise at its steps: pass noise=, see noise.for_run.")
            settings["noise"] = noise
        if self.needs_shift:
            settings["shift"] = shift
        return self.steps(x, [float(sigma) for sigma in sigmas], **settings)

    def calls(self, sigmas: Sequence[float], *, shift: float = DEFAULT_SHIFT) -> list[float]:
        """Every sigma that a run over `sigmas` will ask the model about, in order, bit for bit.

        Known without a model since the levels depend on nothing but `sigmas`; hence not for `adaptive` samplers.
        """
        assert not self.adaptive, f"{self.name} chooses its sigmas as it goes"
        zero = torch.zeros(())
        asked: list[float] = []

        def answer(_: Tensor, sigma: float) -> Any:
            asked.append(sigma)
            return Guided(zero, zero) if self.needs_uncond else zero

        sample(self(zero, sigmas, noise=lambda *_: zero, shift=shift), answer)
        return asked

    def with_options(self, **options: Option) -> "SamplerSpec":
        """The same sampler with other constants, such as `eta` or `order`.

        Raises:
            RequestError: the algorithm has no option of that name.
        """
        parameters = inspect.signature(self.steps).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("noise", "shift")]
        for name in options:
            if name not in known:
                hint = did_you_mean(name, known) or f" It has: {', '.join(known) or 'none'}."
                raise RequestError(f"The sampler {self.name} has no option '{name}'.{hint}")
        return replace(self, options={**self.options, **options})


def check_order(order: int, *, most: int) -> None:
    """Refuse an order, given as an option, that a multistep sampler does not have.

    Raises:
        RequestError: not from 1 to `most`.
    """
    if not 1 <= order <= most:
        raise RequestError(f"order={order}: this sampler has orders 1 to {most}.")
