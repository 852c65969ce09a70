"""Results are kept within bounds, and work that several want at once is done once."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest

from octavo.errors import JobCancelledError
from octavo.graph.cache import Cache, Result, size_of
from tests.graph.running import Lent, Runs
from tests.graph.toys import IMAGE_PROMPT, TOYS


@dataclass(frozen=True, slots=True)
class Array:
    nbytes: int


def _result(size: int) -> Result:
    return Result(([Array(size)],))


def test_the_least_recently_used_leave_when_bytes_are_short():
    cache = Cache(max_bytes=10_000)
    cache.put("a", _result(3000))
    cache.put("b", _result(3000))
    cache.get("a")

    cache.put("c", _result(3000))

    assert [key in cache for key in "abc"] == [True, False, True]
    assert 6000 <= cache.bytes <= 10_000


def test_no_more_entries_are_kept_than_may_be():
    cache = Cache(max_entries=3)
    for number in range(10):
        cache.put(str(number), _result(1))

    assert len(cache) == 3
    assert "9" in cache


def test_what_alone_is_too_large_is_not_kept():
    cache = Cache(max_bytes=10_000)
    cache.put("small", _result(5000))

    cache.put("large", _result(20_000))

    assert "large" not in cache
    assert "small" in cache


def test_replacing_and_clearing_give_the_bytes_back():
    cache = Cache()
    cache.put("a", _result(5000))
    once = cache.bytes
    cache.put("a", _result(5000))

    assert cache.bytes == once
    cache.clear()
    assert (cache.bytes, len(cache)) == (0, 0)


def test_sizes_are_found_inside_of_what_carries_them():
    carried = {"samples": Array(1000), "conditions": ([Array(500)], Carrier(Array(2000), "text"))}

    assert 3500 < size_of(carried) < 3500 + 10 * 256


@dataclass(frozen=True, slots=True)
class Carrier:
    inside: Any
    name: str


def test_endless_nesting_has_a_size():
    circle: list[Any] = []
    circle.append(circle)

    assert size_of(circle) < 10_000


def test_work_that_many_want_at_once_is_done_once():
    cache, begun, worked = Cache(), threading.Barrier(4), []

    def work() -> Result:
        worked.append(threading.current_thread())
        threading.Event().wait(0.1)
        return _result(1)

    def ask() -> Result:
        begun.wait(10)
        return cache.compute("key", work, lambda: None)

    with ThreadPoolExecutor(4) as pool:
        results = [each.result(10) for each in [pool.submit(ask) for _ in range(4)]]

    assert len(worked) == 1
    assert results == [_result(1)] * 4


def test_one_who_waits_takes_over_when_the_work_fails():
    cache, working = Cache(), threading.Event()
    fail = threading.Event()

    def failing() -> Result:
        working.set()
        assert fail.wait(10)
        raise JobCancelledError("enough")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.compute, "key", failing, lambda: None)
        assert working.wait(10)
        second = pool.submit(cache.compute, "key", lambda: _result(7), lambda: None)
        fail.set()

        assert second.result(10) == _result(7)
        with pytest.raises(JobCancelledError):
            first.result(10)


def test_one_who_waits_can_be_cancelled():
    cache, working, end = Cache(), threading.Event(), threading.Event()

    def slow() -> Result:
        working.set()
        assert end.wait(10)
        return _result(1)

    def cancelled() -> None:
        raise JobCancelledError("enough")

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.compute, "key", slow, lambda: None)
        assert working.wait(10)
        with pytest.raises(JobCancelledError):
            cache.compute("key", slow, cancelled)
        end.set()
        assert first.result(10) == _result(1)


def test_two_runs_at_once_share_the_work_but_not_the_files():
    """Each saves its own picture: a file belongs to the run that wrote it."""
    both, made = threading.Barrier(2), []

    def make(context: Any, **_: Any) -> tuple[str]:
        made.append(context)
        threading.Event().wait(0.1)
        return ("picture",)

    specs = {**TOYS, "EmptyImage": replace(TOYS["EmptyImage"], run=make)}
    cache = Cache()

    def run() -> list[Any]:
        lent = Lent()
        runs = Runs(specs, cache)
        both.wait(10)
        runs.run(IMAGE_PROMPT, lent)
        return lent.saved

    with ThreadPoolExecutor(2) as pool:
        saved = [each.result(10) for each in [pool.submit(run) for _ in range(2)]]

    assert len(made) == 1
    assert saved == [["picture"], ["picture"]]


def test_many_threads_keep_the_books_straight():
    """Whatever they put, take and drop at once: within bounds, and the bytes are those of what is there."""
    cache, begun = Cache(max_bytes=20_000, max_entries=15), threading.Barrier(4)

    def use(seed: int) -> None:
        lot = random.Random(seed)
        begun.wait(10)
        for _ in range(400):
            key = str(lot.randrange(30))
            size = 100 * (1 + int(key))
            got = cache.compute(key, lambda size=size: _result(size), lambda: None)
            assert got == _result(size)
            if lot.random() < 0.2:
                cache.drop(str(lot.randrange(30)))

    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(use, seed) for seed in range(4)]:
            each.result(30)

    left = [cache.get(str(number)) for number in range(30)]
    assert cache.bytes == sum(result.size for result in left if result is not None) <= 20_000
    assert 0 < len(cache) <= 15
