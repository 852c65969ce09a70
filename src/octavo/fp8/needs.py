"""What the choice of a way to multiply depends on: a `Problem`, and the needs that it and the machine meet or do not.

Each need says, as the end of a sentence about a backend, why it is not met; as text it says what is needed.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch

from octavo.fp8.formats import Fp8Format
from octavo.fp8.scale import Block, Form, Granularity

# What may be rounded beside the weight: nothing; inputs to FP8, as FP8 units need them; inputs to whatever is fastest.
Mode = Literal["exact", "fp8", "fast"]
TYPICAL_ROWS = 1024  # tokens of a picture of 512×512, or of two with little text


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """All that a choice depends on: y [M, N] = x [M, K] · weight [N, K]ᵀ, for any M."""

    N: int  # output features
    K: int  # input features
    format: Fp8Format  # of the weight
    granularity: Granularity  # of its scale
    block: Block | None = None  # rows and columns that share a scale, where that is a block
    dtype: torch.dtype  # of x
    device: str  # its type: cpu, cuda, mps
    capability: tuple[int, int] | None = None  # CUDA's, where the device has one
    full_precision: bool = False  # x must not be rounded, says the file
    mode: Mode = "exact"  # whether x may be rounded to fewer bits than its dtype has
    rows: int = TYPICAL_ROWS  # M, when backends are timed
    by_name: bool = False  # the user asked for this one backend, and so permits what it rounds

    def on(self, device: torch.device) -> Self:
        """The same on a device of this machine."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return replace(self, device=device.type, capability=capability)


class Where(Protocol):
    """What needs that are not about weights ask of a problem, of whatever kind it is."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> str: ...

    @property
    def capability(self) -> tuple[int, int] | None: ...

    @property
    def by_name(self) -> bool: ...


class Need(Protocol):
    """A condition on problems or on the machine."""

    def unmet(self, problem: Problem) -> str | None:
        """Why it is not met, as the end of a sentence about the backend; None where it is."""


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A device of this type."""

    type: str

    def __str__(self) -> str:
        return self.type

    def unmet(self, problem: Where) -> str | None:
        return None if problem.device == self.type else f"runs on {self.type}, this is {problem.device}"


@dataclass(frozen=True, slots=True)
class Capability:
    """CUDA compute capability of at least this."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"compute capability {self.major}.{self.minor}"

    def unmet(self, problem: Where) -> str | None:
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

    def __str__(self) -> str:
        return f"{self.dimension} divisible by {self.divisor}"

    def unmet(self, problem: Problem) -> str | None:
        size = problem.N if self.dimension == "N" else problem.K
        return f"{self.dimension}={size} is not divisible by {self.divisor}" if size % self.divisor else None


@dataclass(frozen=True, slots=True)
class ComputeDtype:
    """Activations in one of these dtypes."""

    dtypes: tuple[torch.dtype, ...]

    def __str__(self) -> str:
        return " or ".join(map(dtype_name, self.dtypes))

    def unmet(self, problem: Where) -> str | None:
        if problem.dtype in self.dtypes:
            return None
        return f"takes {' or '.join(map(dtype_name, self.dtypes))}, not {dtype_name(problem.dtype)}"


@dataclass(frozen=True, slots=True)
class Formats:
    """A weight in one of these formats."""

    formats: tuple[Fp8Format, ...]

    def __str__(self) -> str:
        return " or ".join(fmt.name for fmt in self.formats)

    def unmet(self, problem: Problem) -> str | None:
        if problem.format in self.formats:
            return None
        return f"reads {' or '.join(fmt.name for fmt in self.formats)}, not {problem.format.name}"


@dataclass(frozen=True, slots=True)
class Granularities:
    """A weight whose scales are of one of these kinds."""

    kinds: tuple[Granularity, ...]

    def __str__(self) -> str:
        return f"scales by {' or '.join(self.kinds)}"

    def unmet(self, problem: Problem) -> str | None:
        if problem.granularity in self.kinds:
            return None
        return f"takes scales by {' or '.join(self.kinds)}, not by {problem.granularity}"


@dataclass(frozen=True, slots=True)
class RoundsInput:
    """Leave to round the activations to fewer bits than their dtype has."""

    to: Form | Literal["bfloat16"]

    def __str__(self) -> str:
        return "mode 'fp8'" if self.to == "e4m3fn" else "mode 'fast'"

    def unmet(self, problem: Problem) -> str | None:
        if problem.full_precision:
            return f"rounds the input to {self.to}, where the file asks for full precision"
        permitted = problem.by_name or problem.mode == "fast" or (problem.mode == "fp8" and self.to == "e4m3fn")
        return None if permitted else f"rounds the input to {self.to}: only in {self}"


@dataclass(frozen=True, slots=True)
class OnlyByName:
    """Being asked for by its name: it defines or diagnoses something, and is of no use otherwise."""

    def __str__(self) -> str:
        return "asking for it by name"

    def unmet(self, problem: Where) -> str | None:
        return None if problem.by_name else "is taken only when asked for by name"


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator that this build of torch may lack."""

    name: str  # as torch.ops has it: namespace.operator

    def __str__(self) -> str:
        return f"torch's {self.name}"

    def unmet(self, problem: Problem) -> str | None:  # noqa: ARG002  # the machine alone decides
        namespace, _, operator = self.name.partition(".")
        return None if hasattr(getattr(torch.ops, namespace), operator) else f"this build of torch lacks {self.name}"


@dataclass(frozen=True, slots=True)
class Package:
    """An optional package."""

    name: str

    def __str__(self) -> str:
        return f"the package {self.name}"

    def unmet(self, problem: Where) -> str | None:  # noqa: ARG002  # the machine alone decides
        return None if importlib.util.find_spec(self.name) else f"the package {self.name} is not installed"


@dataclass(frozen=True, slots=True)
class Supported:
    """Something that a function of torch tells about the processor."""

    what: str
    by: Callable[[], bool]

    def __str__(self) -> str:
        return self.what

    def unmet(self, problem: Problem) -> str | None:  # noqa: ARG002  # the machine alone decides
        return None if self.by() else f"this processor lacks {self.what}"


def dtype_name(dtype: torch.dtype) -> str:
    """As the user writes it: bfloat16."""
    return str(dtype).removeprefix("torch.")
