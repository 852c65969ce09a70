"""What each way to multiply needs, whether this device can use it, and how long it takes on the shapes of SD3.5."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from octavo.fp8.backends import Backend, UnusableError, choose_backend, unquantized
from octavo.fp8.formats import E4M3FN
from octavo.fp8.matmul import BACKENDS
from octavo.fp8.needs import Problem
from octavo.fp8.timing import Timings


@dataclass(frozen=True, slots=True)
class Shape:
    """x [M, K] times a weight [N, K]."""

    what: str
    M: int
    K: int
    N: int


# Medium's tokens are those of 256×256 px, two rows of a batch, 154 of text in each; T5's of one prompt.
SHAPES = (
    Shape("qkv of Medium", 820, 1536, 4608),
    Shape("fc1 of Medium", 820, 1536, 6144),
    Shape("fc2 of Medium", 820, 6144, 1536),
    Shape("modulation of Medium, 28 steps", 56, 1536, 9216),
    Shape("wi of T5-XXL", 77, 4096, 10240),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One way to multiply on one device."""

    name: str
    about: str
    needs: str
    rows: str | None  # in what 8 bits it takes rows from fused steps; None where it takes 16
    exact: str | None  # why not in mode "exact"; None where it can
    fast: str | None  # why not in mode "fast"
    chosen: tuple[str, ...]  # modes in which it is the one that is taken, unless times say otherwise
    milliseconds: tuple[float | str | None, ...]  # by SHAPES; why it failed, or None where it was not measured


def survey(
    device: torch.device, dtype: torch.dtype, *, measure: bool = False, backends: Sequence[Backend] = BACKENDS
) -> list[Finding]:
    """Every backend on `device` for inputs of `dtype`, for a weight e4m3fn by row as large as Medium's fc1.

    With `measure`, times of all that can be used, and last those of F.linear with a weight that is not quantized.
    """
    timings = Timings() if measure else None

    def problem(shape: Shape) -> Problem:
        typical = Problem(N=shape.N, K=shape.K, format=E4M3FN, granularity="row", dtype=dtype, device="", rows=shape.M)
        return replace(typical, mode="fast").on(device)

    def times(backend: Backend) -> tuple[float | str | None, ...]:
        return tuple(_milliseconds(timings, backend, replace(problem(shape), by_name=True)) for shape in SHAPES)

    typical = problem(SHAPES[1])
    exact = replace(typical, mode="exact")
    taken = {mode: choose_backend(backends, replace(typical, mode=mode)).backend for mode in ("exact", "fast")}
    findings = [
        Finding(
            name=backend.name,
            about=backend.about,
            needs=", ".join(map(str, backend.needs)) or "nothing",
            rows=backend.form,
            exact=backend.refusal(exact),
            fast=backend.refusal(typical),
            chosen=tuple(mode for mode, chosen in taken.items() if chosen is backend),
            milliseconds=times(backend),
        )
        for backend in backends
    ]
    if timings is not None:
        rival = unquantized(dtype)
        findings.append(
            Finding(rival.name, "a weight that is not quantized, to compare", "", None, None, None, (), times(rival))
        )
        timings.save()
    return findings


def _milliseconds(timings: Timings | None, backend: Backend, problem: Problem) -> float | str | None:
    if timings is None or backend.refusal(problem) is not None:
        return None
    try:
        return timings(backend, problem) * 1e3
    except UnusableError as error:
        return str(error)
