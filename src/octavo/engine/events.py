"""What the service tells about its jobs while they run, and what a runner is handed."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from octavo.engine.jobs import Stored
from octavo.engine.queue import Queue
from octavo.errors import DeadlineExceededError, JobCancelledError, JobError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job. Of one job they arrive in order, `number` counting from 0.

    From the service: "queued" {}, "started" {attempts}, "requeued" {}, and as the last one of a job "finished"
    {result, seconds}, "failed" {error, result, state} or "cancelled" {result}. From runners: "stage" {stage},
    "progress" {value, max}, "preview" {width, height} with a JPEG, and whatever else they emit.
    """

    job: str  # id
    type: str
    data: dict[str, Any]
    binary: bytes | None = field(default=None, repr=False)
    number: int = 0


LAST = frozenset({"finished", "failed", "cancelled"})  # types after which nothing more comes of a job

Handler = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a running job is: the latest of what it told."""

    stage: str | None = None
    value: float = 0
    max: float = 0  # 0 while unknown
    preview: Event | None = None


class Meter(Protocol):
    """What the service counts on; `engine.metrics.Metrics` is one."""

    def request(self, api: str, state: str) -> None:
        """One request was accepted, refused, or ended in this state."""

    def watch_queue(self, depth: Callable[[], Mapping[str, int]]) -> None:
        """Here is whom to ask how many requests wait and run."""

    def seconds(self, stage: str, seconds: float) -> None:
        """A request spent so long in this stage; "wait" is from submitting to starting."""


class Announcer:
    """Hands every event to all who subscribed, in order for each job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handlers: tuple[Handler, ...] = ()
        self._numbers: dict[str, int] = {}

    def subscribe(self, handler: Handler) -> Callable[[], None]:
        """Call `handler` with every event from now on, from worker threads: it must not block.

        Returns:
            Ends the subscription; calling it twice is harmless.
        """
        with self._lock:
            self._handlers = (*self._handlers, handler)

        def unsubscribe() -> None:
            with self._lock:
                self._handlers = tuple(other for other in self._handlers if other is not handler)

        return unsubscribe

    def tell(self, job: str, type: str, data: dict[str, Any], binary: bytes | None = None) -> Event:
        """Make an event and hand it to all. A handler that raises is logged; the job does not suffer."""
        with self._lock:
            number = self._numbers.get(job, 0)
            if type in LAST:
                self._numbers.pop(job, None)
            else:
                self._numbers[job] = number + 1
            handlers = self._handlers
        event = Event(job, type, data, binary, number)
        for handler in handlers:
            try:
                handler(event)
            except Exception:
                logger.exception("A subscriber failed on event %s of request %s", type, job)
        return event


class Waiters:
    """Those who want to know when a certain job is over; each is told once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Callable[[Stored], None]]] = {}

    def add(self, id: str, callback: Callable[[Stored], None]) -> Callable[[], None]:
        """Call `callback` at the end of this job; what is returned withdraws it, and is harmless afterwards."""
        with self._lock:
            self._waiting.setdefault(id, []).append(callback)

        def withdraw() -> None:
            with self._lock:
                others = [other for other in self._waiting.pop(id, []) if other is not callback]
                if others:
                    self._waiting[id] = others

        return withdraw

    def tell(self, stored: Stored) -> None:
        """The job is over. A callback that raises is logged."""
        with self._lock:
            waiting = self._waiting.pop(stored.id, [])
        for callback in waiting:
            try:
                callback(stored)
            except Exception:
                logger.exception("A callback failed at the end of request %s", stored.id)


class Task:
    """A job in the hands of its runner.

    Attributes:
        job: what to do.
        progress: the latest of what was emitted.
    """

    def __init__(self, job: Stored, queue: Queue, announcer: Announcer) -> None:
        self.job = job
        self.progress = Progress()
        self._queue = queue
        self._announcer = announcer
        self._reason: JobError | None = None

    def emit(self, type: str, data: dict[str, Any] | None = None, binary: bytes | None = None) -> None:
        """Tell all who listen; see `Event` for types that have a meaning."""
        data = {} if data is None else data
        event = self._announcer.tell(self.job.id, type, data, binary)
        old = self.progress
        if type == "stage":
            self.progress = Progress(stage=data["stage"], preview=old.preview)
        elif type == "progress":
            self.progress = Progress(stage=old.stage, value=data["value"], max=data["max"], preview=old.preview)
        elif type == "preview":
            self.progress = Progress(stage=old.stage, value=old.value, max=old.max, preview=event)

    def check(self) -> None:
        """Raise if the job is to stop; a runner calls it as often as it can stop, at least at every step.

        Raises:
            JobCancelledError: someone cancelled it.
            DeadlineExceededError: its deadline is past.
            ShutdownError: the server stops.
        """
        if self._reason is not None:
            raise self._reason
        deadline = self.job.deadline
        if deadline is not None and self._queue.clock() >= deadline:
            raise DeadlineExceededError(
                f"Its deadline passed while it ran, {deadline - self.job.created:.1f} s after it was submitted. Allow "
                f"more time, or ask for fewer steps or a smaller picture."
            )

    def note_file(self, path: Path) -> None:
        """Reserve a file's name before the file appears, so that an attempt cut short leaves nothing behind.

        Raises:
            FileExistsError: the name is taken; use another.
        """
        self._queue.note_file(self.job.id, path)

    def stop(self, reason: JobError) -> None:
        """From now on `check` raises this; being cancelled outweighs all else."""
        if not isinstance(self._reason, JobCancelledError):
            self._reason = reason
