"""Where a job is, for those who watch it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["encode", "trajectories", "sensitivity", "write", "record", "train", "judge", "gate"]
Report = Callable[[Phase, int, int], object]
"""Told the phase, how much of it is done, and of how much."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job is."""

    phase: Phase
    done: int  # prompts, stages of the model, layers, bytes, steps or pictures, by the phase
    total: int
