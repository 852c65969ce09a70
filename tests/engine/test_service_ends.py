"""How requests end other than well: errors, cancelling, deadlines."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from octavo.engine import service as service_module
from octavo.engine.events import Announcer
from octavo.engine.jobs import Stored
from octavo.engine.queue import Queue
from octavo.engine.service import Event, Task
from octavo.errors import (
    JobCancelledError,
    JobError,
    OctavoError,
    QueueFileError,
    ShutdownError,
)
from tests.engine.queues import Clock, quick
from tests.engine.services import LAST, Gate, eventually, over, serving


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = quick(tmp_path)
    yield queue
    queue.close()


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_error_ends_its_own_request_only(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    def ours(_: Task) -> dict[str, Any]:
        raise OctavoError("Use a smaller size.")

    def told(_: Task) -> dict[str, Any]:
        raise JobError("Node 8 failed.", details={"node_id": "8"}, result={"outputs": {}})

    def bug(_: Task) -> dict[str, Any]:
        raise ZeroDivisionError("secret detail")

    def leaves(_: Task) -> dict[str, Any]:
        raise SystemExit(3)

    def odd(_: Task) -> dict[str, Any]:
        return {"x": object()}

    with serving(queue, workers=1, ours=ours, told=told, bug=bug, leaves=leaves, odd=odd) as service:
        ended = {kind: over(service, service.submit(kind, {}).id) for kind in ("ours", "told", "bug", "leaves", "odd")}
        unknown = over(service, service.submit("unknown", {}).id)
        assert over(service, service.submit("steps", {}).id).state == "done"
    assert {job.state for job in ended.values()} == {unknown.state} == {"failed"}
    assert ended["ours"].error == {"type": "OctavoError", "message": "Use a smaller size."}
    assert ended["told"].error == {"type": "JobError", "message": "Node 8 failed.", "details": {"node_id": "8"}}
    assert ended["told"].result == {"outputs": {}}
    for kind, name in (("bug", "ZeroDivisionError"), ("leaves", "SystemExit")):
        error = ended[kind].error
        assert error is not None
        assert error["type"] == "InternalError"
        assert error["message"].startswith(f"Internal error ({name});")
        assert ended[kind].id in error["message"]
    assert "secret detail" not in str(ended["bug"].error)
    assert "secret detail" in caplog.text
    assert f"Internal error in request {ended['bug'].id}" in caplog.text
    assert ended["odd"].error is not None
    assert ended["odd"].error["message"].startswith("The result cannot be stored as JSON")
    assert unknown.error is not None
    assert "kind 'unknown'" in unknown.error["message"]


def test_a_listener_that_raises_harms_nobody(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    def raises(_: object) -> None:
        raise ValueError("listener")

    heard: list[Event] = []
    with serving(queue) as service:
        service.subscribe(raises)
        service.subscribe(heard.append)
        id = service.submit("steps", {}).id
        service.when_over(id, raises)
        assert over(service, id).state == "done"
    assert heard[-1].type == "finished"
    assert "A subscriber failed on event finished" in caplog.text
    with caplog.at_level(logging.ERROR):
        eventually(lambda: "A callback failed" in caplog.text)


def test_a_result_is_written_once_the_file_can_be_written_again(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "RETRY_WRITING", 0.01)
    attempts = Counter[str]()

    def refusing(name: str) -> Callable[..., Any]:
        real = getattr(queue, name)

        def act(*arguments: Any) -> Any:
            attempts[name] += 1
            if attempts[name] <= 3:
                raise QueueFileError("The disk is full.")
            return real(*arguments)

        return act

    for name in ("claim", "finish", "expire"):
        monkeypatch.setattr(queue, name, refusing(name))
    with serving(queue, workers=1) as service:
        assert over(service, service.submit("steps", {}).id).state == "done"
    assert min(attempts.values()) > 3


# ── cancelling and deadlines ─────────────────────────────────────────────────────────────────────────────────────


def test_cancelling_what_waits_and_what_runs(queue: Queue) -> None:
    gate, events = Gate(), list[Event]()
    with serving(queue, workers=1, gate=gate) as service:
        service.subscribe(events.append)
        running = service.submit("gate", {}).id
        gate.wait_for(1)
        waiting = service.submit("gate", {}).id
        others = [service.submit("steps", {}, client="c").id for _ in range(2)]
        assert service.cancel(waiting)
        assert over(service, waiting).state == "cancelled"
        assert [job.id for job in service.cancel_queued(client="c")] == others
        assert service.cancel(running)
        assert over(service, running).state == "cancelled"
        assert not service.cancel(running)
        assert not service.cancel("nobody")
        assert over(service, service.submit("steps", {}).id).state == "done"
    ends = Counter(event.job for event in events if event.type in LAST)
    assert set(ends.values()) == {1}
    assert {event.job for event in events if event.type == "cancelled"} == {waiting, running, *others}


def test_a_cancelled_runner_may_leave_what_it_had(queue: Queue) -> None:
    gate = Gate()

    def half(task: Task) -> dict[str, Any]:
        try:
            return gate(task)
        except JobCancelledError as cancelled:
            cancelled.result = {"pictures": 1}
            raise

    with serving(queue, half=half) as service:
        id = service.submit("half", {}).id
        gate.wait_for(1)
        service.cancel(id)
        assert over(service, id).result == {"pictures": 1}


def test_cancelling_at_any_moment_ends_a_request_once(queue: Queue) -> None:
    events: list[Event] = []
    with serving(queue, workers=3) as service, ThreadPoolExecutor(4) as clients:
        service.subscribe(events.append)
        for n in range(100):
            id = service.submit("steps", {}).id
            if n % 3 == 0:
                time.sleep(0.0005)
            clients.submit(service.cancel, id)
            assert over(service, id).state in ("done", "cancelled")
    ends = Counter(event.job for event in events if event.type in LAST)
    assert len(ends) == 100
    assert set(ends.values()) == {1}
    assert queue.counts()["done"] + queue.counts()["cancelled"] == 100


def test_cancelling_between_the_claim_and_the_start_is_noticed(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = queue.claim

    def claim_and_cancel() -> Stored | None:
        job = claim()
        if job is not None:
            assert service.cancel(job.id)
        return job

    monkeypatch.setattr(queue, "claim", claim_and_cancel)
    with serving(queue, gate=Gate()) as service:
        assert over(service, service.submit("gate", {}).id).state == "cancelled"


def test_being_cancelled_outweighs_the_servers_stop(queue: Queue) -> None:
    task = Task(queue.submit("steps", {}), queue, Announcer())
    for reason in (ShutdownError("stop"), JobCancelledError("cancelled"), ShutdownError("stop")):
        task.stop(reason)
    with pytest.raises(JobCancelledError):
        task.check()


def test_the_deadline_stops_a_running_request(tmp_path: Path) -> None:
    clock, gate = Clock(), Gate()
    queue = quick(tmp_path, clock)
    with serving(queue, gate=gate) as service:
        id = service.submit("gate", {}, deadline=clock.now + 10).id
        gate.wait_for(1)
        waiting = service.wait(id, 0.03)
        assert waiting is not None
        assert waiting.state == "running"
        clock.now += 10
        failed = over(service, id)
    assert failed.state == "failed"
    assert failed.error is not None
    assert failed.error["type"] == "DeadlineExceededError"
    assert "10.0 s after it was submitted" in failed.error["message"]
    queue.close()


def test_what_waits_fails_at_its_deadline_while_all_workers_are_busy(queue: Queue) -> None:
    gate, events = Gate(), list[Event]()
    with serving(queue, workers=1, gate=gate) as service:
        service.subscribe(events.append)
        service.submit("gate", {})
        gate.wait_for(1)
        patient = service.submit("steps", {}, deadline=time.time() + 1000).id
        deadline = time.time() + 0.1
        late = over(service, service.submit("steps", {}, deadline=deadline).id)
        assert late.finished is not None
        assert late.finished >= deadline
        assert late.started is None
        gate.open.set()
        assert over(service, patient).state == "done"
    (failed,) = [event for event in events if event.type == "failed"]
    assert failed.data["error"] == late.error
