"""Services for tests, with runners that draw nothing."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from octavo.engine.jobs import Stored
from octavo.engine.queue import Queue
from octavo.engine.service import Service, Task

PATIENCE = 20  # seconds that anything may take on a busy machine
LAST = ("finished", "failed", "cancelled")


class Gate:
    """A runner that waits to be let through, and stops when told to."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self, task: Task) -> dict[str, Any]:
        self.entered.release()
        while not self.open.wait(0.002):
            task.check()
        return {"attempts": task.job.attempts}

    def wait_for(self, jobs: int) -> None:
        for _ in range(jobs):
            assert self.entered.acquire(timeout=PATIENCE)


def steps(task: Task) -> dict[str, Any]:
    task.emit("stage", {"stage": "denoise"})
    for n in range(3):
        task.check()
        task.emit("progress", {"value": n + 1, "max": 3})
    task.emit("preview", {"width": 8, "height": 8}, b"jpeg")
    return {"n": task.job.payload.get("n")}


@contextmanager
def serving(queue: Queue, *, start: bool = True, **runners: Any) -> Iterator[Service]:
    settings = {key: runners.pop(key) for key in ("workers", "metrics") if key in runners}
    service = Service(queue, {"steps": steps, **runners}, **settings)
    if start:
        service.start()
    try:
        yield service
    finally:
        service.stop(timeout=PATIENCE)


def over(service: Service, id: str) -> Stored:
    stored = service.wait(id, PATIENCE)
    assert stored is not None
    assert stored.over
    return stored


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
