"""Events from the engine's threads to whoever waits in the event loop.

The engine calls handlers in its worker threads. `Hub` carries each event over to the loop and hands it to those who
follow its job; a follower that does not keep up loses previews and progress first, never the end of a job.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from octavo.engine.events import LAST, Event

logger = logging.getLogger(__name__)

PASSING = frozenset({"progress", "preview", "stage"})  # types of events that the next one makes stale
LONGEST = 256  # events kept for one follower


class Follower:
    """Events of one job, or of all, in order, for one reader.

    Attributes:
        wants_previews: whether these are worth making for it.
    """

    def __init__(self) -> None:
        self.wants_previews = False
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._passing = 0

    def put(self, event: Event) -> None:
        """Keep the event; when too many wait, the oldest that is stale leaves."""
        self._events.append(event)
        self._passing += event.type in PASSING
        if len(self._events) > LONGEST and self._passing:
            stale = next(each for each in self._events if each.type in PASSING)
            self._events.remove(stale)
            self._passing -= 1
        self._arrived.set()

    async def next(self, timeout: float | None = None) -> Event | None:
        """The next event; None where `timeout` seconds pass without one."""
        while not self._events:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout)
            except TimeoutError:
                return None
        event = self._events.popleft()
        self._passing -= event.type in PASSING
        return event

    async def __aiter__(self) -> AsyncIterator[Event]:
        while event := await self.next():
            yield event


class Hub:
    """Who follows which job. All methods but `publish` and `watched` belong to the event loop.

    A follower that nobody holds any more is forgotten by itself.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()  # for the sets of followers, which `watched` reads in other threads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._of: dict[str, WeakSet[Follower]] = {}
        self._of_all: WeakSet[Follower] = WeakSet()
        self._handlers: list[Callable[[Event], None]] = []
        self._arrived: deque[Event] = deque()
        self._called = False  # whether the loop will come for them

    def open(self) -> None:
        """Events from now on go to the running loop."""
        self._loop, self._called = asyncio.get_running_loop(), False
        self._arrived.clear()

    def close(self) -> None:
        """Later events go nowhere."""
        self._loop = None

    def publish(self, event: Event) -> None:
        """Take an event from any thread."""
        loop = self._loop
        if loop is None:
            return
        self._arrived.append(event)
        with self._turn:
            # Once for all that come before it is awake: with sixteen runs on their way, waking it for every event took
            # the device's thread more time than its own work in between.
            if self._called:
                return
            self._called = True
        try:
            loop.call_soon_threadsafe(self._fetch)
        except RuntimeError:
            # The loop has been closed since we looked: the server is leaving, and nobody listens.
            return

    @contextmanager
    def follow(self, job: str | None = None) -> Iterator[Follower]:
        """The events of a job, or of all jobs, from now on."""
        follower = Follower()
        follower.wants_previews = True
        self.add(job, follower)
        try:
            yield follower
        finally:
            self.drop(job, follower)

    def add(self, job: str | None, follower: Follower) -> None:
        """Let `follower` have the events of a job, or of all."""
        with self._turn:
            (self._of_all if job is None else self._of.setdefault(job, WeakSet())).add(follower)

    def drop(self, job: str | None, follower: Follower) -> None:
        """Let it have no more of them."""
        with self._turn:
            followers = self._of_all if job is None else self._of.get(job, WeakSet())
            followers.discard(follower)
            if job is not None and not followers:
                self._of.pop(job, None)

    def watched(self, job: str) -> bool:
        """Whether any follower of a job wants previews of it."""
        with self._turn:
            return any(each.wants_previews for each in (*self._of.get(job, ()), *self._of_all))

    def listen(self, handler: Callable[[Event], None]) -> Callable[[], None]:
        """Call `handler` in the loop with every event; returns how to stop it."""
        self._handlers.append(handler)
        return lambda: self._handlers.remove(handler)

    def _fetch(self) -> None:
        with self._turn:
            self._called = False  # before the first is taken: one that comes from now on calls again
        while self._arrived:
            try:
                self._hand_on(self._arrived.popleft())
            except Exception:  # of one event; the others are not its
                logger.exception("An event could not be handed on.")

    def _hand_on(self, event: Event) -> None:
        for follower in (*self._of.get(event.job, ()), *self._of_all):
            follower.put(event)
        if event.type in LAST:
            with self._turn:
                self._of.pop(event.job, None)
        for handler in tuple(self._handlers):
            handler(event)
