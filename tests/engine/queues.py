"""Queues for tests: a clock that is set by hand, and no waiting for the disk."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from octavo.engine.queue import Queue


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class QuickQueue(Queue):
    """A queue that does not flush to the disk; only a power cut could tell the difference."""

    def sync(self) -> None:
        pass


def quick(folder: Path, clock: Clock | None = None, **settings: Any) -> QuickQueue:
    if clock is not None:
        settings["clock"] = clock
    return QuickQueue(folder / "queue.sqlite3", **settings)


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory, where the machine has one, for tests that open so many files that a busy disk would decide
    how long they take."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="octavo-queue-", dir=memory if memory.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
