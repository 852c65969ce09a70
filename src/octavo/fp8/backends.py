"""Ways to multiply by an FP8 weight, as data, and the choice among them.

A `Backend` names a function and its `needs`. `choose_backend` takes the first one whose needs a `Problem` meets, or by
measured times the best of them, and keeps for each of the others the reason why not. The backends themselves are in
`matmul`; `prepare` makes the choice for each layer of a model, once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import RequestError, did_you_mean
from octavo.fp8.needs import Need, Problem, RoundsInput, dtype_name
from octavo.fp8.scale import Form, Scaled, dequantize

# x [M, K], the weight [N, K], bias [N] and a calibrated scale of x, shape [] → [M, N] in x's dtype.
ScaledMatmul = Callable[[Tensor, Scaled, Tensor | None, Tensor | None], Tensor]
# The same from x in 8 bits with a scale [] or [M, 1], and the dtype of the result.
RowsMatmul = Callable[[Scaled, Scaled, Tensor | None, torch.dtype], Tensor]


class UnusableError(RequestError):
    """A backend whose needs are met has failed all the same when it was tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One way to multiply by an FP8 weight."""

    name: str
    run: ScaledMatmul
    about: str = ""  # what it does, in a few words
    needs: tuple[Need, ...] = ()
    twin: Callable[[Scaled], Scaled] | None = None  # the form of the weight that `run` takes, where it is not FP8
    run_scaled: RowsMatmul | None = None  # for one that rounds its input: the second half of `run`

    @property
    def form(self) -> Form | None:
        """In what 8 bits `run_scaled` takes its rows; None where there is none."""
        if self.run_scaled is None:
            return None
        return next(need.to for need in self.needs if isinstance(need, RoundsInput) and need.to != "bfloat16")

    @property
    def rounds_input(self) -> bool:
        """Whether it costs more quality than the FP8 weight does."""
        return any(isinstance(need, RoundsInput) for need in self.needs)

    def refusal(self, problem: Problem) -> str | None:
        """Why it cannot serve `problem`; None where it can."""
        return next((reason for need in self.needs if (reason := need.unmet(problem)) is not None), None)


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend for a problem, and why no other."""

    backend: Backend
    reasons: Mapping[str, str]  # by the names of those not chosen


def find_backend(backends: Sequence[Backend], name: str) -> Backend:
    """The backend called `name`.

    Raises:
        RequestError: there is none; lists those that are.
    """
    known = {backend.name: backend for backend in backends}
    if name not in known:
        raise RequestError(
            f"There is no backend '{name}'. Use one of {', '.join(sorted(known))}.{did_you_mean(name, known)}"
        )
    return known[name]


def choose_backend(
    backends: Sequence[Backend],
    problem: Problem,
    *,
    measure: Callable[[Backend, Problem], float] | None = None,
    wanted: Backend | None = None,
) -> Choice:
    """The backend for `problem`.

    Without times it is the first one that can. With them it is the fastest, save that a backend which rounds the input
    has to be faster than F.linear with a weight that is not quantized: else it would cost quality and win nothing.

    Args:
        backends: in order of preference; one of them at least without needs.
        problem: its shape, dtypes and device.
        measure: gives a backend's time for the problem; raises `UnusableError` where it fails.
        wanted: take this one if it can serve the problem; if not, the choice is as without.
    """
    if wanted is not None:
        refused = wanted.refusal(replace(problem, by_name=True))
        if refused is None:
            others = [backend.name for backend in backends if backend is not wanted]
            return Choice(wanted, dict.fromkeys(others, f"'{wanted.name}' was asked for"))
        choice = choose_backend(backends, problem, measure=measure)
        return Choice(choice.backend, {**choice.reasons, wanted.name: refused})
    reasons = {backend.name: reason for backend in backends if (reason := backend.refusal(problem)) is not None}
    usable = [backend for backend in backends if backend.name not in reasons]
    assert usable, "the plain definition serves every problem"
    if measure is None:
        chosen = usable[0]
        reasons |= {backend.name: f"'{chosen.name}' comes before it" for backend in usable[1:]}
        return Choice(chosen, reasons)
    times, failures = _times(usable, problem, measure)
    reasons |= failures
    rival = unquantized(problem.dtype)
    limit = measure(rival, problem) if any(backend.rounds_input for backend in usable) else 0.0
    idle = {b.name for b in usable if b.name in times and b.rounds_input and times[b.name] >= limit}
    chosen = min((b for b in usable if b.name in times and b.name not in idle), key=lambda b: times[b.name])
    for name, time in times.items():
        if name in idle:
            reasons[name] = f"rounds the input and measured {time / limit:.2f} times as slow as {rival.name}"
        elif name != chosen.name:
            reasons[name] = f"measured {time / times[chosen.name]:.2f} times as slow as '{chosen.name}'"
    return Choice(chosen, reasons)


def _times(
    usable: Sequence[Backend], problem: Problem, measure: Callable[[Backend, Problem], float]
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds by name, and why others have none."""
    times, failures = dict[str, float](), dict[str, str]()
    for backend in usable:
        try:
            times[backend.name] = measure(backend, problem)
        except UnusableError as error:
            if not backend.needs:  # the definition must work
                raise
            failures[backend.name] = str(error)
    return times, failures


def unquantized(dtype: torch.dtype) -> Backend:
    """F.linear with the weight kept in `dtype`: not among the ways, for it takes the memory; a rival to measure."""

    def run(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001
        return F.linear(x, weight.q, bias)

    def twin(weight: Scaled) -> Scaled:
        return Scaled(dequantize(weight, dtype), weight.scale)

    return Backend(name=f"F.linear in {dtype_name(dtype)}", run=run, twin=twin)
