"""Whose turn it is: a fair share of the workers for every client.

First comes the client with the fewest requests running; among equals the one whose requests have taken the least time
of late; among equals the one that has waited longest for a turn. So clients that always have work waiting hold equally
many workers, and share a single worker second by second, however long each one's requests are.

"Of late" is as in Linux's completely fair scheduler: a client that had nothing to do does not save up time. When it
comes back, it is set level with the client that was served least among those present.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush


class Shares:
    """The account of who was served how much. Not thread-safe: the queue asks it under its own lock."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()
        self._served: dict[str, float] = {}  # seconds, of clients that may be ahead of others
        self._turns: dict[str, int] = {}  # which turn was a client's latest
        self._turn = 0
        self._floor = 0.0  # seconds served of the client behind all others; never falls
        self._present: set[str] = set()

    def choose(self, ages: Mapping[str, int]) -> str:
        """The client whose turn it is, of those waiting.

        Args:
            ages: for every client with work waiting, the place in the queue's history of the request it would run;
                the smaller, the older. Not empty.
        """
        self._welcome(ages)
        return min(ages, key=lambda client: self._rank(client, ages[client]))

    def started(self, client: str) -> None:
        """A request of this client begins to run."""
        self._running[client] += 1
        self._turn += 1
        self._turns[client] = self._turn

    def ended(self, client: str, seconds: float) -> None:
        """A request of this client ran for so long, and ended in one way or another."""
        self._running[client] -= 1
        if self._running[client] <= 0:
            del self._running[client]
        self._served[client] = self._served.get(client, self._floor) + max(0.0, seconds)

    def order(self, waiting: Mapping[str, Sequence[int]], seconds: float) -> list[int]:
        """All of `waiting` in the order of their turns to come, if nothing is added and nobody leaves.

        Args:
            waiting: client → ages of its requests, in the order in which it would run them; none empty.
            seconds: how long a request runs, as far as can be told.
        """
        future = self._copy()
        future._welcome(waiting)
        ahead = {client: deque(ages) for client, ages in waiting.items()}
        running = deque(future._running.elements())
        heap = [(future._rank(client, ages[0]), client) for client, ages in ahead.items()]
        heapify(heap)
        places: list[int] = []
        while heap:
            rank, client = heappop(heap)
            if not ahead[client] or rank != future._rank(client, ahead[client][0]):
                continue  # outdated: every change pushes anew
            places.append(ahead[client].popleft())
            future.started(client)
            running.append(client)
            # One leaves for each that comes: as many run as do now, but at least one.
            leaving = running.popleft()
            future.ended(leaving, seconds)
            for changed in {client, leaving}:
                if ahead.get(changed):
                    heappush(heap, (future._rank(changed, ahead[changed][0]), changed))
        return places

    def _rank(self, client: str, age: int) -> tuple[int, float, int, int]:
        """What decides whose turn it is; the smallest goes first."""
        return self._running[client], self._served[client], self._turns.get(client, 0), age

    def _welcome(self, waiting: Iterable[str]) -> None:
        """Set newcomers level, and forget those who are gone and not ahead of anyone."""
        present = {*waiting, *self._running}
        stayed = [self._served[client] for client in present & self._present if client in self._served]
        # Where nobody stayed the workers have been idle, and all begin anew.
        self._floor = max(self._floor, min(stayed) if stayed else max(self._served.values(), default=0.0))
        for client in present:
            self._served[client] = max(self._served.get(client, 0.0), self._floor)
        for client in [name for name, served in self._served.items() if name not in present and served <= self._floor]:
            del self._served[client]
            self._turns.pop(client, None)
        self._present = present

    def _copy(self) -> "Shares":
        other = Shares()
        other._running = self._running.copy()
        other._served = self._served.copy()
        other._turns = self._turns.copy()
        other._turn, other._floor, other._present = self._turn, self._floor, set(self._present)
        return other
