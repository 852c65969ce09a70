"""The most memory that a first picture takes, beside what the memory plan had predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from octavo.devices import trim_memory
from octavo.evaluate.bench_models import Wanted, open_model
from octavo.evaluate.bench_picture import Sheet, draw
from octavo.evaluate.bench_results import Results
from octavo.evaluate.bench_step import variants_here
from octavo.evaluate.bench_timing import NEVER, Deadline
from octavo.evaluate.machine import device_peak, forget_peaks, host_peak
from octavo.pipeline.components import Components


def memory_variants(wanted: Wanted) -> dict[str, Callable[[], Components]]:
    """By name, what makes a model anew whose memory is to be weighed."""
    return {name: partial(open_model, variant) for name, variant in variants_here(wanted).items()}


def bench_memory(
    variants: Mapping[str, Callable[[], Components]],
    sheet: Sheet,
    results: Results,
    device: torch.device,
    *,
    prefix: str,
    predicted: Callable[[Components], int | None] = lambda _components: None,
    deadline: Deadline = NEVER,
) -> None:
    """The most bytes that a first picture takes, loading included, one variant after the other.

    On a GPU: of tensors on the device (`torch.cuda.max_memory_allocated`); on a CPU: of the whole process.
    """
    for name, make in variants.items():
        if deadline.passed:
            results.leave_out(f"{prefix}.{name}", "no time was left")
            continue
        with results.guarded(f"{prefix}.{name}"), _counted(device) as peak:
            components = make()
            draw(components, sheet)
            nbytes, expected = peak(), predicted(components)
            told: dict[str, object] = {
                "pixels": [sheet.width, sheet.height],
                "of": "device" if device.type == "cuda" else "process",
            }
            if expected is not None:
                told |= {"predicted": expected, "over_predicted": float(f"{nbytes / expected:.3g}")}
            results.add(f"{prefix}.{name}", float(nbytes), "B", told)
            del components


@contextmanager
def _counted(device: torch.device) -> Iterator[Callable[[], int]]:
    """Peaks are counted anew from here; asked for them, gives the most bytes since."""
    trim_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    forget_peaks(device)

    def peak() -> int:
        return device_peak(device) or host_peak()

    yield peak
