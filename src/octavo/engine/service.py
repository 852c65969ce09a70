"""Workers that take requests from the queue, run them, and tell how it goes.

A runner is a function from a `Task` to plain JSON; there is one for each kind of request. Each worker thread runs one
request at a time: the workers wait for the device together, so there should be as many as requests may share a batch.
One more thread fails what waits past its deadline. Nobody polls.

An error ends its own request only. One of ours (`OctavoError`) is the user's to read; of any other the user learns
that it is an internal error, and the log has the rest.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, Unpack

from octavo.engine.events import Announcer, Event, Handler, Meter, Progress, Task, Waiters
from octavo.engine.jobs import Options, Order, Stored
from octavo.engine.queue import Queue
from octavo.errors import (
    JobCancelledError,
    JobError,
    OctavoError,
    QueueFileError,
    QueueFullError,
    RequestError,
    ShutdownError,
)

__all__ = ["Event", "Handler", "Meter", "Progress", "Runner", "Service", "Task"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Runner = Callable[[Task], Mapping[str, Any]]

RETRY_WRITING = 2.0  # seconds between attempts to write to a queue file that refuses
LONGEST_NAP = 60.0  # seconds; deadlines follow the wall clock, which may be set while we wait


class Service:
    """The workers of one queue.

    Args:
        queue: stays the caller's, who closes it after `stop`.
        runners: by kind of request.
        workers: how many requests run at once.
        metrics: counts, if given.
    """

    def __init__(
        self, queue: Queue, runners: Mapping[str, Runner], *, workers: int = 8, metrics: Meter | None = None
    ) -> None:
        self.queue = queue
        self._runners = dict(runners)
        self._metrics = metrics
        self._announcer = Announcer()
        self._tasks: dict[str, Task] = {}
        self._waiters = Waiters()
        self._announcing: Counter[str] = Counter()  # changed, but not yet said to be; see `_first_word`
        self._lock = threading.Lock()
        self._told = threading.Condition(self._lock)  # one id less in `_announcing`
        self._work_came = threading.Condition(self._lock)  # `_news` rose, or the state changed
        self._deadline_came = threading.Condition(self._lock)  # as well
        self._news = 0
        self._state = "new"  # → running ⇄ paused → stopping → interrupting → stopped
        names = [f"octavo-worker-{n}" for n in range(workers)]
        # Daemons: a runner that hangs must not keep the process alive.
        self._workers = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        self._keeper = threading.Thread(target=self._keep_deadlines, name="octavo-deadlines", daemon=True)
        if metrics is not None:
            metrics.watch_queue(queue.depth)

    # ── for those who have a request ─────────────────────────────────────────────────────────────────────────────

    def submit(self, kind: str, payload: Mapping[str, Any], **options: Unpack[Options]) -> Stored:
        """Accept a request, as `Queue.submit`; a worker may take it while it is still being made safe.

        It waits for the disk: call it from a thread, not from an event loop.

        Raises:
            RequestError, ConflictError, QueueFullError, QueueFileError: as `Queue.submit`.
        """
        order = Order(kind=kind, payload=payload, **options)
        with self._first_word(str(order.id)):
            try:
                stored, new = self.queue.add(order)
            except QueueFullError:
                self._count(order.api, "refused")
                raise
            if new:
                self._count(stored.api, "accepted")
                self._announcer.tell(stored.id, "queued", {})
        with self._lock:
            self._news += 1
            self._work_came.notify()
            if order.deadline is not None:
                self._deadline_came.notify()
        self.queue.sync()
        return stored

    def cancel(self, id: str) -> bool:
        """Cancel a request: at once if it waits, at its next step if it runs. False where it is over or unknown."""
        self._announced(id)
        state = self.queue.cancel(id)
        if state == "queued" and (stored := self.queue.get(id)) is not None:
            self._over(stored)
        with self._lock:
            task = self._tasks.get(id)
        if state == "running" and task is not None:
            task.stop(_cancelled())
        return state is not None

    def cancel_queued(self, *, kind: str | None = None, client: str | None = None) -> list[Stored]:
        """Cancel all that waits, of one kind or client if given."""
        cancelled = self.queue.cancel_queued(kind=kind, client=client)
        for stored in cancelled:
            self._announced(stored.id)
            self._over(stored)
        return cancelled

    def wait(self, id: str, timeout: float | None = None) -> Stored | None:
        """The request once it is over, or as it is when the time is up; None where there is none of that id."""
        done = threading.Event()
        last: list[Stored] = []

        def take(stored: Stored) -> None:
            last.append(stored)
            done.set()

        forget = self.when_over(id, take)
        try:
            if self.queue.get(id) is not None:
                done.wait(timeout)
        finally:
            forget()
        return last[0] if last else self.queue.get(id)

    def when_over(self, id: str, callback: Callable[[Stored], None]) -> Callable[[], None]:
        """Call `callback` once with the request when it is over; now, if it is already.

        The call comes from a worker thread (or this one) after the request's last event, and must not block.

        Returns:
            Withdraws the callback.
        """
        withdraw = self._waiters.add(id, callback)
        stored = self.queue.get(id)
        with self._lock:
            told = id not in self._tasks  # else its worker is about to emit the last event, and tells us after that
        if told and stored is not None and stored.over:
            self._waiters.tell(stored)
        return withdraw

    def subscribe(self, handler: Handler) -> Callable[[], None]:
        """Hear of every event of every job; see `Announcer.subscribe`."""
        return self._announcer.subscribe(handler)

    def progress(self, id: str) -> Progress | None:
        """The latest that a running job told; None where it does not run."""
        with self._lock:
            task = self._tasks.get(id)
        return None if task is None else task.progress

    # ── for the one who runs the server ──────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Put what an earlier process left in order, and begin to work. Once in a service's life."""
        if self._state != "new":
            raise RuntimeError(f"This service is {self._state}; make a new one.")
        for stored in self.queue.recover():
            logger.warning("Request %s ran when the server ended; it is now %s", stored.id, stored.state)
            if stored.over:
                self._over(stored)
            else:
                self._announcer.tell(stored.id, "requeued", {})
        with self._lock:  # so that a stop meanwhile finds threads that it can wait for
            self._state = "running"
            for thread in (*self._workers, self._keeper):
                thread.start()

    def pause(self) -> None:
        """Begin no more requests; those that run go on."""
        if self._state == "running":
            self._turn_to("paused")

    def resume(self) -> None:
        """End a pause."""
        if self._state == "paused":
            self._turn_to("running")

    def stop(self, timeout: float = 30.0, grace: float = 5.0) -> None:
        """Stop in good order: nothing is lost, and nothing counts as a death.

        Args:
            timeout: seconds that running requests may take to finish. Then they are stopped at their next step and
                go back to the queue.
            grace: seconds to wait for that. A request that does not stop even then runs until the process ends, and
                waits again after the next start.
        """
        if self._state in ("new", "stopped"):
            self._state = "stopped"
            return
        self._turn_to("stopping")
        _join([*self._workers, self._keeper], timeout)
        self._turn_to("interrupting")
        with self._lock:
            tasks = list(self._tasks.values())
        for task in tasks:
            task.stop(_shutdown())
        _join(self._workers, grace)
        self._turn_to("stopped")
        if any(worker.is_alive() for worker in self._workers):
            for stored in self.queue.running():
                logger.warning("Request %s does not stop; it is run again after the next start", stored.id)
                self.queue.leave(stored.id)

    # ── the threads ──────────────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        while True:
            with self._lock:
                self._work_came.wait_for(lambda: self._state != "paused")
                if self._state != "running":
                    return
                seen = self._news
            job = self._persist(self.queue.claim)
            if job is not None:
                self._run(job)
            else:
                with self._lock:
                    while self._state == "running" and self._news == seen:
                        self._work_came.wait()

    def _run(self, job: Stored) -> None:
        self._announced(job.id)
        task = Task(job, self.queue, self._announcer)
        with self._lock:
            self._tasks[job.id] = task
            if self._state == "interrupting":
                task.stop(_shutdown())
        # It may have been cancelled after it was claimed and before it was among the tasks.
        if self._persist(lambda: self.queue.cancelled(job.id)):
            task.stop(_cancelled())
        if self._metrics is not None:
            self._metrics.seconds("wait", max(0.0, (job.started or job.created) - job.created))
        task.emit("started", {"attempts": job.attempts})
        outcome = self._outcome(task)
        try:
            ended = self._persist(outcome)
        except RequestError as error:  # what the runner gave is not plain data
            reason = _reason(error)
            ended = self._persist(lambda: self.queue.fail(job.id, reason))
        over = ended if ended is not None and ended.over else None
        if over is not None:
            self._say_over(over)
        with self._lock:
            if self._tasks.get(job.id) is task:  # else it was requeued, and another worker may have it by now
                del self._tasks[job.id]
        if over is not None:
            self._waiters.tell(over)
            with suppress(QueueFileError):  # what was written is safe from all but a power cut
                self.queue.sync()

    def _outcome(self, task: Task) -> Callable[[], Stored | None]:
        """Run the runner; returns how to write down what came of it."""
        id, queue = task.job.id, self.queue
        try:
            task.check()
            if task.job.kind not in self._runners:
                known = ", ".join(sorted(self._runners))
                raise OctavoError(f"This server does not do requests of the kind '{task.job.kind}', only: {known}.")
            result = self._runners[task.job.kind](task)
            return lambda: queue.finish(id, result)
        except JobCancelledError as stopped:
            partial = stopped.result
            return lambda: queue.end_cancelled(id, partial)
        except ShutdownError:
            return lambda: self._requeue(id)
        except OctavoError as error:
            reason = _reason(error)
            partial = error.result if isinstance(error, JobError) else None
            return lambda: queue.fail(id, reason, partial)
        except BaseException as error:  # SystemExit, too, must not take a worker away
            logger.exception("Internal error in request %s (%s)", id, task.job.kind)
            message = f"Internal error ({type(error).__name__}); the server's log says more under request {id}."
            return lambda: queue.fail(id, {"type": "InternalError", "message": message})

    def _requeue(self, id: str) -> Stored | None:
        with self._first_word(id):
            stored = self.queue.requeue(id)
            with self._lock:
                self._tasks.pop(id, None)
            if stored is not None and not stored.over:
                self._announcer.tell(id, "requeued", {})
        return stored

    def _keep_deadlines(self) -> None:
        while True:
            with self._lock:
                if self._state not in ("running", "paused"):
                    return
                seen = self._news
            for stored in self._persist(self.queue.expire) or []:
                self._announced(stored.id)
                self._over(stored)
            deadline = self._persist(self.queue.next_deadline)
            nap = None if deadline is None else min(LONGEST_NAP, max(0.0, deadline - self.queue.clock()))
            with self._lock:
                # What came meanwhile, perhaps with a deadline of its own, has not been looked at.
                if self._news == seen and self._state in ("running", "paused"):
                    self._deadline_came.wait(nap)

    # ── within ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _turn_to(self, state: str) -> None:
        with self._lock:
            self._state = state
            self._work_came.notify_all()
            self._deadline_came.notify_all()

    @contextmanager
    def _first_word(self, id: str) -> Iterator[None]:
        """While the block changes the state of a request and says so, `_announced` holds all others up."""
        with self._lock:
            self._announcing[id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._announcing[id] -= 1
                if not self._announcing[id]:
                    del self._announcing[id]
                self._told.notify_all()

    def _announced(self, id: str) -> None:
        """Wait until others have said what they did to a request, so that its events stay in order."""
        with self._lock:
            self._told.wait_for(lambda: id not in self._announcing)

    def _over(self, stored: Stored) -> None:
        """Say that a request is over which no worker had, and tell those who wait for it."""
        self._say_over(stored)
        self._waiters.tell(stored)

    def _say_over(self, stored: Stored) -> None:
        """Count a request that is over, and emit its last event."""
        self._count(stored.api, stored.state)
        if stored.state == "done":
            self._announcer.tell(stored.id, "finished", {"result": stored.result, "seconds": stored.seconds})
        elif stored.state == "cancelled":
            self._announcer.tell(stored.id, "cancelled", {"result": stored.result})
        else:
            data = {"error": stored.error, "result": stored.result, "state": stored.state}
            self._announcer.tell(stored.id, "failed", data)

    def _count(self, api: str, state: str) -> None:
        if self._metrics is not None:
            self._metrics.request(api, state)

    def _persist(self, step: Callable[[], T]) -> T | None:
        """Do something with the queue's file, again and again until it works; None where the service stopped first."""
        while True:
            try:
                return step()
            except QueueFileError as error:
                if self._state == "stopped":
                    return None
                logger.error("%s The service tries again in %g s.", error, RETRY_WRITING)
            with self._lock:
                self._work_came.wait_for(lambda: self._state == "stopped", timeout=RETRY_WRITING)


def _cancelled() -> JobCancelledError:
    return JobCancelledError("It was cancelled.")


def _shutdown() -> ShutdownError:
    return ShutdownError("The server stops; the request goes back to the queue.")


def _reason(error: OctavoError) -> dict[str, Any]:
    """What is stored of an error that is meant for the user."""
    reason: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, JobError) and error.details is not None:
        reason["details"] = error.details
    return reason


def _join(threads: list[threading.Thread], timeout: float) -> None:
    """Wait for all of them, but no longer than so many seconds together."""
    end = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
