"""The most memory that a first picture takes, beside what the memory plan had predicted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from octavo.devices import trim_memory
from octavo.evaluate.bench_models import Wanted, open_model, require_room
from octavo.evaluate.bench_picture import Sheet, draw
from octavo.evaluate.bench_results import Results
from octavo.evaluate.bench_step import variants_here
from octavo.evaluate.bench_timing import NEVER, Deadline
from octavo.evaluate.machine import device_peak, forget_peaks, host_peak
from octavo.pipeline.components import Components

# Device memory by model: with everything of the transformer but its modulation resident, and streamed.
BUDGETS: Mapping[str, Sequence[str]] = {"large": ("6.5GB", "3GB"), "medium": ("3GB", "2GB")}


def memory_variants(wanted: Wanted) -> dict[str, Callable[[], Components]]:
    """By name, what makes a model anew whose memory is to be weighed: on a GPU also under budgets."""
    variants = dict(variants_here(wanted))
    if wanted.device.type == "cuda":
        variants |= {f"fp8_{vram}": replace(variants["fp8"], vram=vram) for vram in BUDGETS.get(wanted.model, ())}
    return {name: partial(open_model, variant) for name, variant in variants.items()}


def bench_memory(
    variants: Mapping[str, Callable[[], Components]],
    sheet: Sheet,
    results: Results,
    device: torch.device,
    *,
    prefix: str,
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
            require_room([components.mmdit, *components.encoders, components.vae])
            draw(components, sheet)
            nbytes = peak()
            placing = components.placing
            expected = None if placing is None else placing.plan.peak
            told: dict[str, object] = {
                "pixels": [sheet.width, sheet.height],
                "of": "device" if device.type == "cuda" else "process",
            }
            if expected is not None:
                told |= {"predicted": expected, "over_predicted": float(f"{nbytes / expected:.3g}")}
            if placing is not None:
                told |= {"budget": placing.plan.budget, "plan": str(placing)}
            results.add(f"{prefix}.{name}", float(nbytes), "B", told)
            if placing is not None:  # what the memory saved costs in time, all being loaded
                denoise = draw(components, sheet)["denoise"]
                results.add(f"{prefix}.{name}.denoise", denoise, conditions={"steps": sheet.steps})
            del components


@contextmanager
def _counted(device: torch.device) -> Iterator[Callable[[], int]]:
    """Peaks are counted anew from here; asked for them, gives the most bytes since."""
    gc.collect()  # what others left behind must not count
    trim_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    forget_peaks(device)

    def peak() -> int:
        return device_peak(device) or host_peak()

    yield peak
