"""How long work takes: many ways in turns, the device idle around each, until enough rounds or no time is left.

Nothing is asserted about speed. Figures are medians with the 95th percentile beside them, and ways that are compared
run in the same rounds, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

Run = Callable[[], object]
Clock = Callable[[], float]

SHORTEST = 2e-3  # seconds of a repeat: what is shorter is repeated within, so that starting it does not count


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


class Deadline:
    """A moment after which no new work is begun."""

    def __init__(self, seconds: float = math.inf, *, clock: Clock = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        """Seconds until then, 0 afterwards."""
        return max(0.0, self._end - self._clock())

    @property
    def passed(self) -> bool:
        return self.left == 0

    def within(self, seconds: float) -> Deadline:
        """That of a part, which may take `seconds` but no longer than the whole."""
        return Deadline(min(seconds, self.left), clock=self._clock)


NEVER = Deadline()


def measure(run: Run, *, warmup: int = 5, repeats: int = 30, clock: Clock = time.perf_counter) -> Timing:
    """Time `run`, the device idle before and after each repeat."""
    return interleave({"run": run}, warmup=warmup, repeats=repeats, clock=clock)["run"]


def interleave(
    runs: Mapping[str, Run],
    *,
    warmup: int = 2,
    repeats: int = 10,
    clock: Clock = time.perf_counter,
    deadline: Deadline = NEVER,
    many: bool = False,
) -> dict[str, Timing]:
    """Time several runs in turns: each round goes through all of them, the next one backwards: A B, B A, A B, …

    Args:
        runs: what to time, by name.
        warmup: untimed rounds before.
        repeats: timed rounds; fewer, but one at least, where the deadline comes before.
        clock: `time.thread_time` counts the processor's seconds, not the wall's: on a busy machine the fairer measure,
            but only of work on one thread of the CPU.
        many: run short ones several times a repeat, so that a repeat takes 2 ms at least.
    """
    times = dict.fromkeys(runs, 1)
    for turn in range(warmup):
        for name, run in runs.items():
            wait_for_device()
            start = clock()
            run()
            if many and turn == warmup - 1:
                wait_for_device()
                times[name] = min(1000, max(1, math.ceil(SHORTEST / max(clock() - start, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        if turn and deadline.passed:
            break
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            wait_for_device()
            start = clock()
            for _ in range(times[name]):
                runs[name]()
            wait_for_device()
            seconds[name].append((clock() - start) / times[name])
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(ours: Timing, theirs: Timing) -> Timing:
    """Ours over theirs, round by round of `interleave`; below 1 we are faster."""
    return Timing(tuple(a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True)))


def wait_for_device() -> None:
    """Until all that was asked of a GPU is done; at once where there is none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
