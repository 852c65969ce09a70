"""Stopping in good order: nothing is lost, nothing counts as a death."""

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from octavo.engine.jobs import Stored
from octavo.engine.queue import Queue
from octavo.engine.service import Service, Task
from octavo.errors import (
    ShutdownError,
)
from tests.engine.queues import quick
from tests.engine.services import PATIENCE, Gate, eventually, over, serving, steps


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = quick(tmp_path)
    yield queue
    queue.close()


# ── stopping ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stopping_lets_what_runs_finish_and_keeps_what_waits(queue: Queue) -> None:
    gate = Gate()
    with serving(queue, workers=2, gate=gate) as service:
        running = [service.submit("gate", {}).id for _ in range(2)]
        gate.wait_for(2)
        waiting = service.submit("steps", {}).id
        threading.Timer(0.05, gate.open.set).start()
        service.stop(timeout=PATIENCE)
        states = [job.state for id in (*running, waiting) if (job := queue.get(id))]
        assert states == ["done", "done", "queued"]


def test_what_does_not_finish_in_time_goes_back_without_its_files(queue: Queue, tmp_path: Path) -> None:
    gate = Gate()
    path = tmp_path / "half.png"
    caught: list[BaseException] = []

    def draws(task: Task) -> Mapping[str, Any]:
        task.note_file(path)
        path.write_text("half")
        try:
            return gate(task)
        except ShutdownError as stopped:
            caught.append(stopped)
            raise

    with serving(queue, draws=draws) as service:
        id = service.submit("draws", {}).id
        gate.wait_for(1)
        service.stop(timeout=0.02, grace=PATIENCE)
    assert len(caught) == 1
    assert not path.exists()
    job = queue.get(id)
    assert job is not None
    assert (job.state, job.attempts) == ("queued", 0)
    gate.open.set()
    with serving(queue, draws=draws) as service:
        assert over(service, id).state == "done"
    assert path.exists()


def test_stopping_at_once_loses_nothing(tmp_path: Path) -> None:
    """Whatever the workers were doing; the next start finishes everything, and nothing counts as a death."""
    queue = quick(tmp_path)
    ids = [queue.submit("steps", {"n": n}).id for n in range(60)]
    for _ in range(15):
        numbers: dict[str, list[int]] = {}
        service = Service(queue, {"steps": steps}, workers=4)
        service.subscribe(lambda event: numbers.setdefault(event.job, []).append(event.number))  # noqa: B023
        service.start()
        service.stop(timeout=0.0, grace=PATIENCE)
        assert queue.depth()["running"] == 0
        assert all(heard == list(range(len(heard))) for heard in numbers.values())
    with serving(queue, workers=4) as service:
        assert [over(service, id).result for id in ids] == [{"n": n} for n in range(60)]
    assert all(job.attempts == 0 for job in queue.jobs())
    queue.close()


def test_what_was_just_claimed_when_time_was_up_goes_back_too(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, claimed = queue.claim, threading.Event()

    def late() -> Stored | None:
        job = claim()
        if job is not None:
            claimed.set()
            eventually(lambda: service._state == "interrupting")
            time.sleep(0.05)  # until those that were known to run have been told
        return job

    monkeypatch.setattr(queue, "claim", late)
    service = Service(queue, {"gate": Gate()}, workers=1)
    service.start()
    id = service.submit("gate", {}).id
    assert claimed.wait(PATIENCE)
    service.stop(timeout=0.0, grace=PATIENCE)
    job = queue.get(id)
    assert job is not None
    assert (job.state, job.attempts) == ("queued", 0)


def test_a_runner_that_hangs_does_not_stop_the_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    queue = quick(tmp_path)
    entered, release = threading.Event(), threading.Event()

    def hangs(_: Task) -> dict[str, Any]:
        entered.set()
        release.wait(PATIENCE)
        return {}

    service = Service(queue, {"hangs": hangs}, workers=1)
    service.start()
    id = service.submit("hangs", {}).id
    assert entered.wait(PATIENCE)
    service.stop(timeout=0.01, grace=0.01)
    assert f"Request {id} does not stop" in caplog.text
    queue.close()
    release.set()
    for worker in service._workers:
        worker.join(PATIENCE)
        assert not worker.is_alive()
    queue = quick(tmp_path)
    (recovered,) = queue.recover()
    assert (recovered.id, recovered.state, recovered.attempts) == (id, "queued", 0)
    queue.close()


def test_a_service_starts_once(queue: Queue) -> None:
    with serving(queue) as service, pytest.raises(RuntimeError, match="running"):
        service.start()
    with pytest.raises(RuntimeError, match="stopped"):
        service.start()
    unused = Service(queue, {})
    unused.stop()
