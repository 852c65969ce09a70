"""What every benchmark does alike: measure, compare side by side, weigh in a process of its own, report as JSON.

Benchmarks assert nothing about speed. Each figure is one line of JSON with its unit, spread and conditions, so that a
number in the docs can name the command that made it.
"""

import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Run = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each repeat, in the order they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def p95(self) -> float:
        """95th percentile by nearest rank: of fewer than 20 repeats, the slowest."""
        return sorted(self.seconds)[math.ceil(0.95 * len(self.seconds)) - 1]


def measure(run: Run, *, warmup: int = 5, repeats: int = 30, clock: Clock = time.perf_counter) -> Timing:
    """Time `run`, the device idle before and after each repeat."""
    return interleave({"run": run}, warmup=warmup, repeats=repeats, clock=clock)["run"]


def interleave(
    runs: Mapping[str, Run], *, warmup: int = 2, repeats: int = 10, clock: Clock = time.perf_counter
) -> dict[str, Timing]:
    """Time several runs in turns, so that whatever else the machine does meets all of them.

    Each round goes through all runs, the next one backwards: A B, B A, A B, …

    Args:
        runs: what to time, by name.
        warmup: untimed rounds before.
        repeats: timed rounds.
        clock: `time.thread_time` counts the processor's seconds, not the wall's: on a busy machine the fairer measure,
            but only of work on one thread of the CPU.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            _wait_for_device()
            start = clock()
            runs[name]()
            _wait_for_device()
            seconds[name].append(clock() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(ours: Timing, theirs: Timing) -> Timing:
    """Ours over theirs, round by round of `interleave`; below 1 we are faster."""
    return Timing(tuple(a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True)))


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


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
