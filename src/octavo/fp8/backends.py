"""Ways to multiply by an FP8 weight: what each needs, as data, and the choice among them.

A `Backend` names a function and its needs. `choose_backend` takes the first one whose needs a `Problem` meets, or with
`measure` the fastest of them, and keeps for each of the others the reason why not. The backends themselves are in
`matmul`; `prepare` makes the choice for each layer of a model, once.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from octavo.errors import RequestError, did_you_mean
from octavo.fp8.formats import Fp8Format
from octavo.fp8.scale import Granularity, Scaled

Mode = Literal["exact", "fast"]

# x [M, K], the weight [N, K], bias [N] and a calibrated scale of x, shape [] → [M, N] in x's dtype.
ScaledMatmul = Callable[[Tensor, Scaled, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """All that a choice depends on: y [M, N] = x [M, K] · weight [N, K]ᵀ, whatever M."""

    N: int  # output features
    K: int  # input features
    format: Fp8Format  # of the weight
    granularity: Granularity  # of its scale
    dtype: torch.dtype  # of x
    device: str  # its type: cpu, cuda, mps
    capability: tuple[int, int] | None = None  # CUDA's, where the device has one
    full_precision: bool = False  # x must not be rounded, says the file
    mode: Mode = "exact"  # "fast" permits rounding x to fewer bits than its dtype has
    by_name: bool = False  # the user asked for this one backend, and so permits what it rounds

    def on(self, device: torch.device) -> Self:
        """The same on a device of this machine."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return replace(self, device=device.type, capability=capability)


class Need(Protocol):
    """A condition on problems or on the machine."""

    def unmet(self, problem: Problem) -> str | None:
        """Why it is not met, as the end of a sentence about the backend; None where it is."""


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A device of this type."""

    type: str

    def unmet(self, problem: Problem) -> str | None:
        return None if problem.device == self.type else f"runs on {self.type}, this is {problem.device}"


@dataclass(frozen=True, slots=True)
class Capability:
    """CUDA compute capability of at least this."""

    major: int
    minor: int

    def unmet(self, problem: Problem) -> str | None:
        needed = f"needs compute capability {self.major}.{self.minor}"
        if problem.capability is None:
            return f"{needed}, this is {problem.device}"
        if problem.capability < (self.major, self.minor):
            return f"{needed}, this device has {problem.capability[0]}.{problem.capability[1]}"
        return None


@dataclass(frozen=True, slots=True)
class DivisibleBy:
    """A dimension that is a multiple."""

    dimension: Literal["N", "K"]
    divisor: int

    def unmet(self, problem: Problem) -> str | None:
        size = problem.N if self.dimension == "N" else problem.K
        return f"{self.dimension}={size} is not divisible by {self.divisor}" if size % self.divisor else None


@dataclass(frozen=True, slots=True)
class ComputeDtype:
    """Activations in one of these dtypes."""

    dtypes: tuple[torch.dtype, ...]

    def unmet(self, problem: Problem) -> str | None:
        if problem.dtype in self.dtypes:
            return None
        return f"takes {' or '.join(map(_name, self.dtypes))}, not {_name(problem.dtype)}"


@dataclass(frozen=True, slots=True)
class Formats:
    """A weight in one of these formats."""

    formats: tuple[Fp8Format, ...]

    def unmet(self, problem: Problem) -> str | None:
        if problem.format in self.formats:
            return None
        return f"reads {' or '.join(fmt.name for fmt in self.formats)}, not {problem.format.name}"


@dataclass(frozen=True, slots=True)
class RoundsInput:
    """Leave to round the activations to fewer bits than their dtype has."""

    to: str

    def unmet(self, problem: Problem) -> str | None:
        if problem.full_precision:
            return f"rounds the input to {self.to}, where the file asks for full precision"
        permitted = problem.mode == "fast" or problem.by_name
        return None if permitted else f"rounds the input to {self.to}: only in mode 'fast'"


@dataclass(frozen=True, slots=True)
class OnlyByName:
    """Being asked for by its name: it defines or diagnoses something, and is of no use otherwise."""

    def unmet(self, problem: Problem) -> str | None:
        return None if problem.by_name else "is taken only when asked for by name"


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator that this build of torch may lack."""

    name: str  # as torch.ops has it: namespace.operator

    def unmet(self, problem: Problem) -> str | None:  # noqa: ARG002  # the machine alone decides
        namespace, _, operator = self.name.partition(".")
        return None if hasattr(getattr(torch.ops, namespace), operator) else f"this build of torch lacks {self.name}"


@dataclass(frozen=True, slots=True)
class Package:
    """An optional package."""

    name: str

    def unmet(self, problem: Problem) -> str | None:  # noqa: ARG002  # the machine alone decides
        return None if importlib.util.find_spec(self.name) else f"the package {self.name} is not installed"


@dataclass(frozen=True, slots=True)
class Supported:
    """Something that a function of torch tells about the processor."""

    what: str
    by: Callable[[], bool]

    def unmet(self, problem: Problem) -> str | None:  # noqa: ARG002  # the machine alone decides
        return None if self.by() else f"this processor lacks {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One way to multiply by an FP8 weight."""

    name: str
    run: ScaledMatmul
    needs: tuple[Need, ...] = ()
    twin: Callable[[Scaled], Scaled] | None = None  # the form of the weight that `run` takes, where it is not FP8

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

    Args:
        backends: in order of preference; one of them at least without needs.
        problem: its shape, dtypes and device.
        measure: gives a backend's time for the problem; the fastest is taken, not the first.
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
    else:
        times = {backend.name: measure(backend, problem) for backend in usable}
        chosen = min(usable, key=lambda backend: times[backend.name])
        reasons |= {
            name: f"measured {time / times[chosen.name]:.2f} times as slow as '{chosen.name}'"
            for name, time in times.items()
            if name != chosen.name
        }
    return Choice(chosen, reasons)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
