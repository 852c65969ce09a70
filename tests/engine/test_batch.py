"""Runs join and leave a running batch: they share calls, fail alone, are never starved, and end as they would alone."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from octavo.engine.batch import Batcher
from octavo.engine.metrics import Metrics
from octavo.errors import NumericsError, ShutdownError
from octavo.pipeline.run import Run, Step, solve
from octavo.pipeline.speed import Speed
from octavo.sampling import SAMPLERS
from tests.engine.fake_model import BAD, FakeModel, Loaded, a_run, prompt

PATIENCE = 30.0  # seconds until a test gives up


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    made = Batcher()
    yield made
    made.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Callers."""
    with ThreadPoolExecutor(40) as made:
        yield made


def quiet(_step: Step) -> None:
    """A watcher that does not care."""


@contextmanager
def held(model: FakeModel) -> Iterator[None]:
    """The model waits in its next call, so that what is done meanwhile is there when the next turn is chosen."""
    model.gate.clear()
    try:
        yield
    finally:
        model.gate.set()


def in_company(batcher: Batcher, pool: ThreadPoolExecutor, model: FakeModel, runs: list[Run]) -> list[Future[Tensor]]:
    """All runs at once: they have joined before the second turn."""
    with held(model):
        futures = [pool.submit(batcher.solve, runs[0], quiet)]
        assert model.started.acquire(timeout=PATIENCE)
        futures += [pool.submit(batcher.solve, run, quiet) for run in runs[1:]]
        wait_for(lambda: batcher.busy == len(runs))
    return futures


def wait_for(true: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(int(PATIENCE / 0.002)):
        if true():
            return
        tick.wait(0.002)
    raise AssertionError("waited in vain")


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_ends_in_company_as_it_does_alone(
    batcher: Batcher, pool: ThreadPoolExecutor, sampler: str
) -> None:
    """Rows of the fake model do not touch each other, so nothing but the sampler's own state could differ."""
    model = FakeModel()
    part = Loaded(model)
    runs = [a_run(part, sampler=sampler, seed=1, guidance=2.0), a_run(part, sampler="euler", seed=2, steps=9)]
    runs.append(a_run(part, sampler=sampler, seed=3, steps=6, text=prompt(0.7, tokens=6)))
    alone = [solve(run, quiet) for run in runs]
    together = [future.result(PATIENCE) for future in in_company(batcher, pool, model, runs)]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_runs_share_calls_while_they_overlap(batcher: Batcher, pool: ThreadPoolExecutor) -> None:
    """Three runs of 9, 5 and 3 questions; two of them join while the first one's first is being answered."""
    model = FakeModel()
    part = Loaded(model)
    for future in in_company(batcher, pool, model, [a_run(part, steps=n, seed=n) for n in (9, 5, 3)]):
        future.result(PATIENCE)
    assert model.calls == [1, 3, 3, 3, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("difference", ["size", "model"])
def test_runs_that_cannot_share_a_call_are_served_by_turns(
    batcher: Batcher, pool: ThreadPoolExecutor, difference: str
) -> None:
    model, other = FakeModel(), FakeModel()
    part = Loaded(model)
    runs = [a_run(part, steps=5), a_run(part, steps=4, seed=1)]
    match difference:
        case "size":
            runs[1] = a_run(part, steps=4, seed=1, size=(4, 6))
        case "model":
            runs[1] = a_run(Loaded(other), steps=4, seed=1)
    alone = [solve(run, quiet) for run in runs]
    for one in (model, other):
        one.calls.clear()
    together = [future.result(PATIENCE) for future in in_company(batcher, pool, model, runs)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert model.calls + other.calls == [1] * 9


def test_texts_of_unlike_lengths_share_calls(batcher: Batcher, pool: ThreadPoolExecutor) -> None:
    model = FakeModel()
    part = Loaded(model)
    runs = [a_run(part, steps=5, text=prompt(0.3, tokens=7)), a_run(part, steps=4, seed=1)]
    together = [future.result(PATIENCE) for future in in_company(batcher, pool, model, runs)]
    assert model.calls == [1, 2, 2, 2, 2]
    assert all(torch.equal(solve(run, quiet), found) for run, found in zip(runs, together, strict=True))


def test_forecast_evaluations_take_no_turn_and_are_counted(pool: ThreadPoolExecutor) -> None:
    """A run at speed beside an exact one: each ends as it does alone, and what is forecast needs no call."""
    model, metrics = FakeModel(), Metrics()
    part = Loaded(model)
    quick = replace(a_run(part, steps=12, seed=1), speed=Speed(name="some", tolerance=1e9, most=2))
    batcher = Batcher(metrics=metrics)
    try:
        runs = [quick, a_run(part, steps=12, seed=2)]
        steps: list[Step] = []
        with held(model):
            futures = [pool.submit(batcher.solve, quick, steps.append)]
            assert model.started.acquire(timeout=PATIENCE)
            futures.append(pool.submit(batcher.solve, runs[1], quiet))
            wait_for(lambda: batcher.busy == len(runs))
        together = [future.result(PATIENCE) for future in futures]
    finally:
        batcher.close()
    assert steps[-1].forecast == 6  # evaluations 1, 2, 3 and 6, 9 and the last are the model's
    assert model.calls == [1, 2, 2, 2, 2, 2, *[1] * 7]
    assert "octavo_evaluations_forecast_total 6.0" in metrics.render().decode()
    assert "octavo_steps_total 18.0" in metrics.render().decode()
    assert all(torch.equal(solve(run, quiet), found) for run, found in zip(runs, together, strict=True))


def test_a_budget_of_tokens_bounds_a_turn(pool: ThreadPoolExecutor) -> None:
    """A question of the fake model is 8 tokens: 4 of text and 2x2 of its latents; 20 tokens are two of them."""
    model = FakeModel()
    part = Loaded(model)
    batcher = Batcher(max_tokens=20)
    futures = in_company(batcher, pool, model, [a_run(part, steps=3, seed=n) for n in range(5)])
    for future in futures:
        future.result(PATIENCE)
    batcher.close()
    assert max(model.calls) == 2
    assert sum(model.calls) == 15


def test_a_short_run_behind_long_ones_is_not_starved(pool: ThreadPoolExecutor) -> None:
    """Ten runs of 50 questions, two a turn, then one of 4: each of its questions waits for at most the ten ahead.

    First come, first served would let it wait for 500 questions, 250 turns of two.
    """
    model = FakeModel()
    part = Loaded(model)
    batcher = Batcher(max_tokens=16)
    runs = [a_run(part, steps=50, seed=n) for n in range(10)]
    seen: list[int] = []

    def watch(_step: Step) -> None:
        seen.append(len(model.calls))

    with held(model):
        longer = [pool.submit(batcher.solve, run, quiet) for run in runs]
        wait_for(lambda: batcher.busy == 10)
        short = pool.submit(batcher.solve, a_run(part, steps=4, seed=99), watch)
        wait_for(lambda: batcher.busy == 11)
    short.result(PATIENCE)
    turns = seen[-1] - seen[0]
    for future in longer:
        future.result(PATIENCE)
    batcher.close()
    assert len(seen) == 5
    # The watcher looks a moment after its step, when the device may have gone on: hence twice the bound.
    assert turns <= 2 * 4 * 11 / 2


def test_watchers_run_in_their_callers_thread_and_see_every_step(batcher: Batcher) -> None:
    part = Loaded(FakeModel())
    seen: list[tuple[int, int, bool]] = []
    threads: set[threading.Thread] = set()

    def watch(step: Step) -> None:
        seen.append((step.done, step.total, step.denoised is not None))
        threads.add(threading.current_thread())

    batcher.solve(a_run(part, steps=3), watch)
    assert seen == [(0, 3, False), (1, 3, True), (2, 3, True), (3, 3, True)]
    assert threads == {threading.current_thread()}


def test_a_run_that_its_watcher_gives_up_is_gone_before_the_next_turn(
    batcher: Batcher, pool: ThreadPoolExecutor
) -> None:
    model = FakeModel()
    part = Loaded(model)

    def stop(step: Step) -> None:
        if step.done == 2:
            model.gate.clear()  # so that what follows can be seen turn by turn
            raise KeyboardInterrupt

    other = pool.submit(batcher.solve, a_run(part, steps=40, seed=1), quiet)
    with pytest.raises(KeyboardInterrupt):
        batcher.solve(a_run(part, steps=1000), stop)
    before = len(model.calls)
    model.gate.set()
    assert other.result(PATIENCE) is not None
    # One call may have been chosen before the watcher spoke; all others are the other run's alone.
    assert sum(rows > 1 for rows in model.calls[before:]) <= 1
    wait_for(lambda: batcher.busy == 0)


def test_a_run_that_fails_does_so_alone(batcher: Batcher, pool: ThreadPoolExecutor) -> None:
    """NaN of one prompt; a text of another width, which cannot even be put beside the others; a sampler that raises."""
    model = FakeModel()
    part = Loaded(model)

    def broken(x: Tensor, sigmas: list[float]) -> Iterator[tuple[Tensor, float]]:
        yield x, sigmas[0]
        raise ZeroDivisionError("of the sampler")

    euler = SAMPLERS["euler"]
    runs = [a_run(part, seed=seed, steps=6) for seed in range(5)]
    alone = [solve(runs[i], quiet) for i in (0, 4)]
    runs[1] = a_run(part, text=prompt(BAD), steps=6)
    runs[2] = a_run(part, text=prompt(0.5, width=5), steps=6)
    runs[3] = replace(runs[3], sampler=replace(euler, steps=broken))
    futures = in_company(batcher, pool, model, runs)
    for future, kind, words in (
        (futures[1], NumericsError, "NaN or infinity in evaluation 1"),
        (futures[2], RuntimeError, "size"),
        (futures[3], ZeroDivisionError, "of the sampler"),
    ):
        with pytest.raises(kind, match=words):
            future.result(PATIENCE)
    assert torch.equal(futures[0].result(PATIENCE), alone[0])
    assert torch.equal(futures[4].result(PATIENCE), alone[1])
    # And the batcher goes on.
    assert torch.equal(batcher.solve(runs[0], quiet), alone[0])


def test_a_run_without_steps_gives_back_what_it_starts_from(batcher: Batcher) -> None:
    run = a_run(Loaded(FakeModel()))
    assert batcher.solve(replace(run, sigmas=[]), quiet) is run.x


def test_other_work_is_done_in_the_device_s_thread_and_its_errors_are_the_caller_s(batcher: Batcher) -> None:
    def where() -> tuple[str, bool]:
        return threading.current_thread().name, torch.is_inference_mode_enabled()

    assert batcher.do(where) == ("octavo-device", True)
    assert batcher.do(lambda: batcher.do(where)) == ("octavo-device", True), "work may be part of other work"
    with pytest.raises(ZeroDivisionError):
        batcher.do(lambda: 1 / 0)
    an_error = ValueError("a result like any other")
    assert batcher.do(lambda: an_error) is an_error


def test_neither_steps_nor_other_work_starve(batcher: Batcher, pool: ThreadPoolExecutor) -> None:
    """Ten pieces of work, longer than a step, wait while a run begins: one after each step, till none is left."""
    model = FakeModel()
    order: list[str] = []

    def counted_model() -> FakeModel:
        order.append("step")
        return model

    def work() -> None:
        time.sleep(0.02)
        order.append("work")

    ready = threading.Event()
    first = pool.submit(batcher.do, lambda: ready.wait(PATIENCE))
    run = pool.submit(batcher.solve, a_run(counted_model, steps=30), quiet)
    wait_for(lambda: batcher.busy == 1)
    pieces = [pool.submit(batcher.do, work) for _ in range(10)]
    wait_for(lambda: len(batcher._works) == 10)
    ready.set()
    for future in (first, run, *pieces):
        future.result(PATIENCE)
    # The model is asked for when the run is let in, and once for its tables.
    told = " ".join(order).removeprefix("step " * 2)
    busy = told[: told.rindex("work") + 4].split()
    assert all("work" in pair for pair in pairwise(busy)), "never two steps in a row where work waits"
    assert "step" in busy, "nor all work before the next step"


def test_closing_tells_whoever_waits_and_whoever_comes(pool: ThreadPoolExecutor) -> None:
    model = FakeModel()
    part = Loaded(model)
    batcher = Batcher()
    with held(model):
        futures = [pool.submit(batcher.solve, a_run(part, seed=n, steps=1000), quiet) for n in range(3)]
        assert model.started.acquire(timeout=PATIENCE)
        wait_for(lambda: batcher.busy == 3)
        futures.append(pool.submit(batcher.do, lambda: None))
        wait_for(lambda: len(batcher._works) == 1)
        closing = pool.submit(batcher.close)
        wait_for(lambda: batcher._closed)
    closing.result(PATIENCE)
    for future in futures:
        with pytest.raises(ShutdownError, match="stopping"):
            future.result(PATIENCE)
    with pytest.raises(ShutdownError):
        batcher.solve(a_run(part), quiet)
    with pytest.raises(ShutdownError):
        batcher.do(lambda: None)
    batcher.close()


def test_a_fault_of_the_device_s_thread_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(*_: object) -> None:
        raise AssertionError("our own mistake")

    batcher = Batcher()
    monkeypatch.setattr(batcher._turns, "turn_took", mistake)
    with pytest.raises(ShutdownError, match="our own mistake"):
        batcher.solve(a_run(Loaded(FakeModel()), steps=5), quiet)
    with pytest.raises(ShutdownError):
        batcher.do(lambda: None)
    batcher.close()


def test_turns_are_counted() -> None:
    metrics = Metrics()
    with ExitStack() as stack:
        batcher = Batcher(metrics=metrics)
        stack.callback(batcher.close)
        batcher.solve(a_run(Loaded(FakeModel()), steps=7), quiet)
    text = metrics.render().decode()
    assert "octavo_steps_total 7.0" in text
    assert "octavo_tokens_total 56.0" in text
    assert "octavo_batch_size_count 7.0" in text
    assert 'octavo_stage_seconds_count{stage="denoise"} 1.0' in text
