"""The laws of two clocks, for schedules drawn at random."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.placement.simulate import Task, Timeline, simulate

LINK = 10.0  # bytes a second, so that copies of some bytes take some seconds


@st.composite
def schedules(draw: st.DrawFn) -> list[Task]:
    """Up to three stages of tasks, each of which may need bytes."""
    tasks = []
    for stage in ("first", "second", "third")[: draw(st.integers(1, 3))]:
        for i in range(draw(st.integers(1, 8))):
            compute, copy = draw(st.integers(0, 20)), draw(st.integers(0, 100))
            pool = draw(st.sampled_from(["a", "b"]))
            tasks.append(Task(stage=stage, name=str(i), compute=float(compute), copy=copy, pool=pool))
    return tasks


def run(tasks: list[Task], slots: int, other: int | None = None) -> Timeline:
    return simulate(tasks, slots={"a": slots, "b": slots if other is None else other}, link=LINK)


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(1, 4), st.integers(1, 4))
def test_the_whole_takes_at_least_what_either_clock_works_and_at_most_both(tasks: list[Task], a: int, b: int) -> None:
    timeline = run(tasks, a, b)
    compute, copy = sum(t.compute for t in tasks), sum(t.copy for t in tasks) / LINK
    assert timeline.busy("compute") == pytest.approx(compute)
    assert timeline.busy("copy") == pytest.approx(copy)
    assert max(compute, copy) <= timeline.total * (1 + 1e-9) + 1e-9
    assert timeline.total <= (compute + copy) * (1 + 1e-9) + 1e-9
    for stage in timeline.seconds:
        own = [t for t in tasks if t.stage == stage]
        assert timeline.seconds[stage] >= max(sum(t.compute for t in own), sum(t.copy for t in own) / LINK) - 1e-9


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(1, 4))
def test_more_buffers_never_make_it_slower(tasks: list[Task], slots: int) -> None:
    assert run(tasks, slots + 1).total <= run(tasks, slots).total + 1e-9


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(1, 4))
def test_no_clock_does_two_things_at_once_and_nothing_computes_before_its_bytes_are_there(
    tasks: list[Task], slots: int
) -> None:
    timeline = run(tasks, slots)
    for clock in ("copy", "compute"):
        own = [event for event in timeline.events if event.clock == clock]
        for before, after in pairwise(own):
            assert before.stop <= after.start + 1e-9
    arrived = {(e.stage, e.name): e.stop for e in timeline.events if e.clock == "copy"}
    for event in timeline.events:
        if event.clock == "compute":
            assert event.start >= arrived.get((event.stage, event.name), 0.0) - 1e-9


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(1, 4))
def test_buffers_never_hold_more_than_there_are(tasks: list[Task], slots: int) -> None:
    timeline = run(tasks, slots)
    for stage, held in timeline.buffers.items():
        by_pool = (
            sorted((t.copy for t in tasks if t.stage == stage and t.pool == pool), reverse=True) for pool in "ab"
        )
        assert held <= sum(sum(sizes[:slots]) for sizes in by_pool)
        assert held == max(event.held for event in timeline.events if event.stage == stage)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(10, 30), st.integers(1, 100)), min_size=1, max_size=12))
def test_two_buffers_hide_all_copies_but_the_first_where_work_takes_longer(work: list[tuple[int, int]]) -> None:
    """No copy takes more than the 10 seconds that the shortest task computes."""
    tasks = [Task(stage="s", name=str(i), compute=float(c), copy=n, pool="a") for i, (c, n) in enumerate(work)]
    assert run(tasks, 2).total == pytest.approx(work[0][1] / LINK + sum(c for c, _ in work))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 100)), min_size=1, max_size=12))
def test_one_buffer_hides_nothing(work: list[tuple[int, int]]) -> None:
    tasks = [Task(stage="s", name=str(i), compute=float(c), copy=n, pool="a") for i, (c, n) in enumerate(work)]
    assert run(tasks, 1).total == pytest.approx(sum(c + n / LINK for c, n in work))


def test_without_copies_only_the_computing_clock_runs() -> None:
    timeline = run([Task(stage="s", name="a", compute=2.0), Task(stage="t", name="b", compute=3.0)], 2)
    assert timeline.seconds == {"s": 2.0, "t": 3.0}
    assert timeline.busy("copy") == timeline.waited() == 0.0
    assert timeline.buffers == {}


def test_a_stage_copies_nothing_before_the_one_before_it_is_over() -> None:
    tasks = [
        Task(stage="s", name="a", compute=5.0),
        Task(stage="t", name="b", compute=1.0, copy=20, pool="a"),
    ]
    timeline = run(tasks, 2)
    assert timeline.seconds == {"s": 5.0, "t": 3.0}
    assert timeline.waited("t") == 2.0
