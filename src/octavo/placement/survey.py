"""What `octavo info --device` tells of attention, and of what makes a step start faster."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from octavo.fp8.backends import UnusableError
from octavo.placement.attention import ATTENTION_BACKENDS, AttentionBackend, Case, choose_attention, seconds
from octavo.placement.compiled import compile_refusal
from octavo.placement.cuda import CudaSeam


@dataclass(frozen=True, slots=True)
class AttentionFinding:
    """One way to attend on one device."""

    name: str
    about: str
    needs: str
    error: float | None  # measured against float32, relative; None where it is not known
    exact: str | None  # why not without --fast; None where it can
    fast: str | None  # why not with --fast
    chosen: tuple[str, ...]  # "exact", "fast": where it is taken, unless times say otherwise
    milliseconds: float | str | None  # of `Case`; why it failed, or None where it was not measured


def survey_attention(
    device: torch.device,
    dtype: torch.dtype,
    *,
    measure: bool = False,
    backends: Sequence[AttentionBackend] = ATTENTION_BACKENDS,
) -> list[AttentionFinding]:
    """Every way to attend on `device`, for a picture of 1024×1024 by SD3.5 Large; with `measure`, also how long."""
    case = Case(dtype=dtype, device="").on(device)
    if device.type == "cpu":
        case = replace(case, batch=1, queries=410, keys=410, heads=24)  # of 256×256 by SD3.5 Medium
    fast = replace(case, mode="fast")
    taken = {name: choose_attention(each, backends=backends) for name, each in (("exact", case), ("fast", fast))}
    return [
        AttentionFinding(
            name=backend.name,
            about=backend.about,
            needs=", ".join(map(str, backend.needs)) or "nothing",
            error=backend.error,
            exact=backend.refusal(case),
            fast=backend.refusal(fast),
            chosen=tuple(name for name, each in taken.items() if each.backend is backend),
            milliseconds=_milliseconds(backend, fast) if measure else None,
        )
        for backend in backends
    ]


def _milliseconds(backend: AttentionBackend, case: Case) -> float | str | None:
    if backend.refusal(replace(case, by_name=True)) is not None:
        return None
    try:
        return seconds(backend, case) * 1e3
    except UnusableError as error:
        return str(error)


def starting(device: torch.device) -> dict[str, str | None]:
    """What makes a step start faster, by option, and why it cannot be used on `device`; None where it can."""
    return {"--graphs": CudaSeam().refusal(device), "--compile": compile_refusal(device)}
