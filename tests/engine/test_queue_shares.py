"""Fair shares: laws that hold whatever the clients ask for."""

import heapq
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from octavo.engine.shares import Shares
from tests.engine.queues import Clock, quick

SECONDS = st.floats(0.01, 100)
CLIENTS = "abcd"


class Shop:
    """Workers that serve clients who always have work waiting, and an account of it kept apart from `Shares`."""

    def __init__(self, shares: Shares, workers: int, seconds: dict[str, list[float]]) -> None:
        self.shares, self.workers, self.seconds = shares, workers, seconds
        self.now = 0.0
        self.ends: list[tuple[float, int, str, float]] = []
        self.claims: Counter[str] = Counter()
        self.served: Counter[str] = Counter()

    @property
    def running(self) -> Counter[str]:
        return Counter(client for *_, client, _ in self.ends)

    def step(self, clients: str) -> str:
        """Fill one place, after time has passed until one is free."""
        if len(self.ends) == self.workers:
            self.now, _, client, seconds = heapq.heappop(self.ends)
            self.shares.ended(client, seconds)
            self.served[client] += seconds
        chosen = self.shares.choose({client: self.claims[client] for client in clients})
        durations = self.seconds[chosen]
        seconds = durations[self.claims[chosen] % len(durations)]
        self.shares.started(chosen)
        self.claims[chosen] += 1
        heapq.heappush(self.ends, (self.now + seconds, sum(self.claims.values()), chosen, seconds))
        return chosen


WORKLOADS = st.fixed_dictionaries({client: st.lists(SECONDS, min_size=1, max_size=5) for client in CLIENTS})


@given(WORKLOADS)
def test_one_worker_is_shared_second_by_second(seconds: dict[str, list[float]]) -> None:
    """The least served is chosen, so no client is ever ahead of another by more than its own longest request."""
    shop = Shop(Shares(), 1, seconds)
    for _ in range(80):
        shop.step(CLIENTS)
        for one in CLIENTS:
            for other in CLIENTS:
                assert shop.served[one] - shop.served[other] <= max(seconds[one]) + 1e-9


@given(WORKLOADS, st.integers(2, 9))
def test_many_workers_are_held_equally(seconds: dict[str, list[float]], workers: int) -> None:
    """A place goes to a client with the fewest; so whoever just got one has at most one more than any other."""
    shop = Shop(Shares(), workers, seconds)
    for _ in range(60):
        chosen = shop.step(CLIENTS)
        assert shop.running[chosen] - min(shop.running[client] for client in CLIENTS) <= 1


@given(SECONDS, st.integers(1, 50))
def test_who_comes_back_has_saved_no_time_and_owes_none(length: float, rounds: int) -> None:
    """After any time away a client is served in turn with the others, neither before nor after them all."""
    shop = Shop(Shares(), 1, {client: [length] for client in CLIENTS})
    for _ in range(3):
        shop.step("ab")
    for _ in range(rounds):
        shop.step("b")
    before = shop.claims.copy()
    for _ in range(20):
        shop.step("ab")
    assert abs((shop.claims["a"] - before["a"]) - (shop.claims["b"] - before["b"])) <= 2


@given(st.integers(1, 8), st.lists(st.integers(1, 30), min_size=2, max_size=4))
def test_requests_that_take_no_time_take_turns(workers: int, loads: list[int]) -> None:
    shop = Shop(Shares(), workers, {client: [0.0] for client in CLIENTS})
    for _ in range(sum(loads)):
        shop.step("abc")
        assert max(shop.claims[client] for client in "abc") - min(shop.claims[client] for client in "abc") <= 1


@given(st.lists(st.tuples(st.sampled_from(CLIENTS), SECONDS), max_size=30))
def test_the_order_foretold_is_the_order_that_comes(past: list[tuple[str, float]]) -> None:
    """With one worker and requests of equal length."""
    shares = Shares()
    for client, seconds in past:
        shares.choose({client: 0})
        shares.started(client)
        shares.ended(client, seconds)
    waiting = {client: [10 * n + position for n in range(5)] for position, client in enumerate(CLIENTS)}
    foretold = shares.order(waiting, 7.0)
    came = []
    while waiting:
        client = shares.choose({client: ages[0] for client, ages in waiting.items()})
        shares.started(client)
        came.append(waiting[client].pop(0))
        if not waiting[client]:
            del waiting[client]
        shares.ended(client, 7.0)
    assert foretold == came


def test_clients_that_left_are_forgotten() -> None:
    shares = Shares()
    for n in range(1000):
        for client in (f"passer-by {n}", "resident"):
            shares.choose({client: n})
            shares.started(client)
            shares.ended(client, 1.0)
    assert len(shares._served) + len(shares._turns) < 20


def test_a_small_request_does_not_wait_for_anothers_hundred(tmp_path: Path) -> None:
    clock = Clock()
    queue = quick(tmp_path, clock)
    for _ in range(100):
        queue.submit("fake", {}, client="many")
    first = queue.claim()
    assert first is not None
    late = queue.submit("fake", {}, client="few").id
    assert queue.position(late) == 0
    clock.now += 10
    queue.finish(first.id, {})
    turn = queue.claim()
    assert turn is not None
    assert turn.id == late
    queue.close()


def test_only_what_still_runs_counts_as_running(tmp_path: Path) -> None:
    """However a request ended, its client's place is free again."""
    clock = Clock()
    queue = quick(tmp_path, clock)
    for client in ("ended", "busy"):
        for n in range(5):
            queue.submit("fake", {}, id=f"{client} {n}", client=client)
    ends: list[Callable[[str], object]] = [
        lambda id: queue.finish(id, {}),
        lambda id: queue.fail(id, {"type": "X", "message": "no"}),
        queue.end_cancelled,
        queue.requeue,
    ]
    for end in ends:
        one, other = queue.claim(), queue.claim()
        assert one is not None
        assert other is not None
        mine, others = (one, other) if one.client == "ended" else (other, one)
        assert (mine.client, others.client) == ("ended", "busy")
        end(mine.id)
        turn = queue.claim()
        assert turn is not None
        assert turn.client == "ended", "none of its requests runs, and one of the other's does"
        for id in (turn.id, others.id):
            queue.requeue(id)
    queue.close()
