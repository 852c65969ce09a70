"""What is nice to have takes its share of the time and no more, by a clock that the tests move."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.pipeline import pace as pace_module
from octavo.pipeline.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    share=st.floats(0.02, 1.0),
    asked=st.lists(st.tuples(st.floats(0.001, 1.0), st.floats(0.001, 1.0)), min_size=1, max_size=50),
)
def test_the_share_is_kept_over_any_time_but_for_the_last_one(share: float, asked: list[tuple[float, float]]) -> None:
    """Of the time up to the start of any of them, those before it took no more than the share."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace_module, "perf_counter", clock)
        pace = Pace(share)
        spent = 0.0
        for gap, cost in asked:
            clock.now += gap
            start = clock.now

            def work(cost: float = cost) -> float:
                clock.now += cost
                return cost

            done = pace(work)
            if done is not None:
                assert spent <= share * start + 1e-9
                spent += done


def test_the_first_is_done_at_once_and_failures_count_as_nothing() -> None:
    pace = Pace(0.01)
    with pytest.raises(ZeroDivisionError):
        pace(lambda: 1 / 0)
    assert pace(lambda: "done") == "done"


def test_nobody_waits_for_another() -> None:
    pace = Pace(1.0)
    inside, leave = threading.Event(), threading.Event()
    results: list[str | None] = []

    def slow() -> str:
        inside.set()
        assert leave.wait(10)
        return "slow"

    thread = threading.Thread(target=lambda: results.append(pace(slow)))
    thread.start()
    assert inside.wait(10)
    assert pace(lambda: "quick") is None
    leave.set()
    thread.join()
    assert results == ["slow"]
