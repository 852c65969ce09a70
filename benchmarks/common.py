"""What every benchmark does alike: measure, compare side by side, weigh in a process of its own, report as JSON.

Benchmarks assert nothing about speed. Each figure is one line of JSON with its unit, spread and conditions, so that a
number in the docs can name the command that made it.
"""

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from octavo.evaluate.bench_timing import Clock, Run, Timing, interleave, measure, ratio

__all__ = ["Clock", "Run", "Timing", "in_own_process", "interleave", "measure", "peak_memory", "ratio", "report"]


def peak_memory() -> int:
    """Most bytes that this process ever held in memory (its resident set)."""
    try:
        # Not `ru_maxrss`: on Linux a process inherits that from the one that started it, however large it was.
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def in_own_process(module: str, arguments: Sequence[str]) -> Any:
    """Run `python -m module arguments` alone, and read the JSON of its last line."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(name: str, unit: str, value: Timing | float, **conditions: object) -> None:
    """Print one figure as a line of JSON, with the conditions that every figure has."""
    if isinstance(value, Timing):
        figure = {"median": _short(value.median), "p95": _short(value.p95), "repeats": len(value.seconds)}
    else:
        figure = {"value": _short(value)}
    print(json.dumps({"name": name, "unit": unit, **figure, **conditions, **_machine()}), flush=True)


def _machine() -> dict[str, object]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    load = round(os.getloadavg()[0], 1)
    threads = torch.get_num_threads()
    return {"device": device, "threads": threads, "load": load, "torch": torch.__version__}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _short(value: float) -> float:
    return float(f"{value:.4g}")
