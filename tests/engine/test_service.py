"""The service's threads with runners that draw nothing."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from octavo.engine.jobs import Stored
from octavo.engine.queue import Queue
from octavo.engine.service import Event, Task
from octavo.errors import (
    QueueFullError,
    RequestError,
)
from tests.engine.queues import quick
from tests.engine.services import LAST, PATIENCE, Gate, eventually, over, serving, steps


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = quick(tmp_path)
    yield queue
    queue.close()


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_is_run_and_told_of_in_order(queue: Queue) -> None:
    events: list[Event] = []
    with serving(queue) as service:
        unsubscribe = service.subscribe(events.append)
        job = service.submit("steps", {"n": 7})
        done = over(service, job.id)
        unsubscribe()
        over(service, service.submit("steps", {}).id)
    assert (done.state, done.result) == ("done", {"n": 7})
    assert [event.type for event in events] == [
        *("queued", "started", "stage", "progress", "progress", "progress", "preview", "finished"),
    ]
    assert [event.number for event in events] == list(range(8))
    assert {event.job for event in events} == {job.id}
    assert events[-2].binary == b"jpeg"
    assert events[-1].data == {"result": {"n": 7}, "seconds": done.seconds}


def test_many_at_once_are_each_told_of_in_order(queue: Queue) -> None:
    seen: dict[str, list[Event]] = {}
    lock = threading.Lock()

    def note(event: Event) -> None:
        with lock:
            seen.setdefault(event.job, []).append(event)

    with serving(queue, workers=6) as service:
        service.subscribe(note)
        with ThreadPoolExecutor(8) as clients:
            jobs = list(clients.map(lambda n: service.submit("steps", {"n": n}), range(150)))
        assert [over(service, job.id).result for job in jobs] == [{"n": n} for n in range(150)]
    assert seen.keys() == {job.id for job in jobs}
    for events in seen.values():
        assert [event.number for event in events] == list(range(8))
        assert (events[0].type, events[-1].type) == ("queued", "finished")


def test_a_worker_that_is_quicker_than_the_announcement_waits_for_it(queue: Queue) -> None:
    gate, events = Gate(), list[Event]()

    def slow(event: Event) -> None:
        if event.type == "queued" and event.job != first:
            gate.open.set()  # the only worker is free now, and takes the request before its announcement is over
            time.sleep(0.1)
        events.append(event)

    with serving(queue, workers=1, gate=gate) as service:
        first = service.submit("gate", {}).id
        gate.wait_for(1)
        service.subscribe(slow)
        second = service.submit("steps", {}).id
        over(service, second)
    assert [event.type for event in events if event.job == second][:2] == ["queued", "started"]


def test_no_more_run_at_once_than_there_are_workers(queue: Queue) -> None:
    gate = Gate()
    with serving(queue, workers=3, gate=gate) as service:
        jobs = [service.submit("gate", {}).id for _ in range(5)]
        gate.wait_for(3)
        assert not gate.entered.acquire(timeout=0.05)
        assert queue.depth() == {"queued": 2, "running": 3}
        gate.open.set()
        assert {over(service, id).state for id in jobs} == {"done"}


def test_what_waited_before_the_start_is_run(queue: Queue) -> None:
    ids = [queue.submit("steps", {"n": n}).id for n in range(5)]
    with serving(queue, workers=2) as service:
        assert [over(service, id).result for id in ids] == [{"n": n} for n in range(5)]


def test_progress_is_the_latest_of_a_running_request(queue: Queue) -> None:
    gate = Gate()

    def slow(task: Task) -> Mapping[str, Any]:
        steps(task)
        return gate(task)

    with serving(queue, slow=slow) as service:
        id = service.submit("slow", {}).id
        gate.wait_for(1)
        progress = service.progress(id)
        assert progress is not None
        assert (progress.stage, progress.value, progress.max) == ("denoise", 3, 3)
        assert progress.preview is not None
        assert progress.preview.binary == b"jpeg"
        gate.open.set()
        over(service, id)
        assert service.progress(id) is None


def test_idle_workers_leave_the_queue_alone(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    claims: list[float] = []
    claim = queue.claim
    monkeypatch.setattr(queue, "claim", lambda: claims.append(time.monotonic()) or claim())
    with serving(queue, workers=4) as service:
        over(service, service.submit("steps", {}).id)
        eventually(lambda: len(claims) >= 5)
        time.sleep(0.05)
        before = len(claims)
        time.sleep(0.3)
        assert len(claims) == before


def test_a_pause_begins_nothing(queue: Queue) -> None:
    gate = Gate()
    with serving(queue, workers=2, gate=gate) as service:
        running = service.submit("gate", {}).id
        gate.wait_for(1)
        service.pause()
        waiting = service.submit("gate", {}).id
        gate.open.set()
        assert over(service, running).state == "done"
        held = service.wait(waiting, 0.05)
        assert held is not None
        assert held.state == "queued"
        service.resume()
        assert over(service, waiting).state == "done"


# ── waiting, counting, forgetting ────────────────────────────────────────────────────────────────────────────────


def test_waiting_ends_with_the_request_or_the_time(queue: Queue) -> None:
    gate = Gate()
    with serving(queue, gate=gate) as service:
        assert service.wait("nobody", PATIENCE) is None
        id = service.submit("gate", {}).id
        unfinished = service.wait(id, 0.01)
        assert unfinished is not None
        assert not unfinished.over
        called: list[Stored] = []
        service.when_over(id, called.append)
        withdraw = service.when_over(id, called.append)
        withdraw()
        gate.open.set()
        done = over(service, id)
        eventually(lambda: called == [done])
        service.when_over(id, called.append)
        assert called == [done, done], "at once where it is over"


def test_nobody_hears_of_the_end_before_the_last_event(queue: Queue) -> None:
    gate, ending, events = Gate(), threading.Event(), list[Event]()

    def slow(event: Event) -> None:
        if event.type == "finished":
            ending.set()
            time.sleep(0.1)
        events.append(event)

    with serving(queue, gate=gate) as service, ThreadPoolExecutor(1) as early:
        service.subscribe(slow)
        id = service.submit("gate", {}).id
        gate.wait_for(1)
        before = early.submit(lambda: (over(service, id), events[-1].type))
        gate.open.set()
        assert ending.wait(PATIENCE)
        assert over(service, id).state == "done", "asked between the end and its announcement"
        assert events[-1].type == "finished"
        assert before.result(PATIENCE)[1] == "finished"


class Counts:
    """A meter that adds up."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.waits: list[float] = []
        self.depth: Callable[[], Mapping[str, int]] = dict

    def request(self, api: str, state: str) -> None:
        self.requests[api, state] += 1

    def watch_queue(self, depth: Callable[[], Mapping[str, int]]) -> None:
        self.depth = depth

    def seconds(self, stage: str, seconds: float) -> None:
        assert stage == "wait"
        self.waits.append(seconds)


def test_every_request_is_counted_in_and_out(tmp_path: Path) -> None:
    queue, counts, gate = quick(tmp_path, limit=2), Counts(), Gate()
    with serving(queue, workers=1, metrics=counts, gate=gate) as service:
        service.submit("gate", {}, api="comfyui")
        gate.wait_for(1)
        for _ in range(2):
            once = service.submit("steps", {}, api="openai", idempotency_key="k").id
        cancelled = service.submit("steps", {}, api="a1111")
        assert counts.depth() == {"queued": 2, "running": 1}
        with pytest.raises(QueueFullError):
            service.submit("steps", {}, api="a1111")
        with pytest.raises(RequestError):
            service.submit("steps", {"x": object()})
        service.cancel(cancelled.id)
        over(service, service.submit("unknown", {}, deadline=time.time() + 0.01).id)
        gate.open.set()
        over(service, once)
    assert counts.requests == {
        ("comfyui", "accepted"): 1,
        ("comfyui", "done"): 1,
        ("openai", "accepted"): 1,
        ("openai", "done"): 1,
        ("a1111", "accepted"): 1,
        ("a1111", "cancelled"): 1,
        ("a1111", "refused"): 1,
        ("octavo", "accepted"): 1,
        ("octavo", "failed"): 1,
    }
    assert len(counts.waits) == 2
    assert min(counts.waits) >= 0
    queue.close()


def test_one_key_submitted_by_many_threads_is_one_request(queue: Queue) -> None:
    events: list[Event] = []
    with serving(queue) as service, ThreadPoolExecutor(10) as clients:
        service.subscribe(events.append)
        jobs = list(clients.map(lambda _: service.submit("steps", {"n": 1}, idempotency_key="k"), range(30)))
        assert len({job.id for job in jobs}) == 1
        over(service, jobs[0].id)
    assert Counter(event.type for event in events)["queued"] == 1
    assert queue.counts()["done"] == 1


def test_two_hundred_impatient_clients_all_get_an_answer(tmp_path: Path) -> None:
    """Some cancel, some go away, some are turned down and come back; afterwards the service remembers nobody."""
    queue = quick(tmp_path, limit=50)
    heard: Counter[str] = Counter()
    lock = threading.Lock()

    def note(event: Event) -> None:
        if event.type in LAST:
            with lock:
                heard[event.job] += 1

    with serving(queue, workers=4) as service, ThreadPoolExecutor(24) as threads:
        service.subscribe(note)

        def client(n: int) -> str:
            end = time.monotonic() + PATIENCE
            while True:
                try:
                    id = service.submit("steps", {"n": n}, client=f"key {n % 7}").id
                    break
                except QueueFullError:
                    assert time.monotonic() < end
                    time.sleep(0.005)
            if n % 20 == 0:
                service.cancel(id)
            if n % 20 == 1:
                service.wait(id, 0.0)
            else:
                assert over(service, id).state in ("done", "cancelled")
            return id

        ids = set(threads.map(client, range(200)))
        eventually(lambda: queue.depth() == {"queued": 0, "running": 0})
        eventually(lambda: len(heard) == 200)
        assert ids == heard.keys()
        assert set(heard.values()) == {1}
        assert not service._tasks
        assert not service._announcing
        assert not service._waiters._waiting
        assert not service._announcer._numbers
    queue.close()
