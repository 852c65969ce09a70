"""The queue's rules, one by one; `test_queue_model` tries them in every order."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.engine.jobs import LARGEST_PAYLOAD
from octavo.engine.queue import Queue
from octavo.errors import ConflictError, JobError, QueueFullError, RequestError
from tests.engine.queues import Clock, QuickQueue, quick


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(tmp_path: Path, clock: Clock) -> Iterator[QuickQueue]:
    queue = quick(tmp_path, clock)
    yield queue
    queue.close()


def claimed(queue: Queue) -> str:
    job = queue.claim()
    assert job is not None
    return job.id


# ── what is stored ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"text": "ein Bär 🐻, \ud800 half a pair, \0 and \n"},
        {"deep": [[{"a": [1, 2.5, None, True]}]], "big": 2**70},
    ],
)
def test_a_payload_comes_back_as_it_was_given(queue: QuickQueue, payload: dict[str, Any]) -> None:
    submitted = queue.submit("fake", payload, id="one", client="Ann", api="comfyui", priority=3)
    running = queue.claim()
    assert running is not None
    assert submitted.payload == running.payload == payload
    assert (running.id, running.kind, running.client, running.api) == ("one", "fake", "Ann", "comfyui")
    assert (running.priority, running.state, running.attempts) == (3, "running", 0)


def test_everything_is_there_after_the_file_is_opened_again(tmp_path: Path, clock: Clock) -> None:
    queue = quick(tmp_path, clock)
    ids = [queue.submit("fake", {"n": n}).id for n in range(4)]
    queue.finish(claimed(queue), {"picture": "a.png"})
    queue.fail(claimed(queue), {"type": "X", "message": "no"}, {"half": 1})
    queue.cancel(ids[2])
    before = [queue.get(id) for id in ids]
    queue.close()
    again = quick(tmp_path, clock)
    assert [again.get(id) for id in ids] == before
    assert [job.state for job in before if job] == ["done", "failed", "cancelled", "queued"]
    assert again.counts() == {"queued": 1, "running": 0, "done": 1, "failed": 1, "cancelled": 1, "set_aside": 0}
    again.close()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kind": ""}, "kind ''"),
        ({"id": "x" * 201}, "1 to 200 printable"),
        ({"client": "a\0b"}, "printable"),
        ({"idempotency_key": "\ud800"}, "printable"),
        ({"priority": 1.5}, "priority 1.5"),
        ({"priority": 10**7}, "whole number"),
        ({"number": float("nan")}, "number nan"),
        ({"number": "first"}, "number 'first'"),
        ({"number": 10**400}, "number 1000"),
        ({"deadline": float("inf")}, "deadline inf"),
        ({"deadline": 999_999.0}, "passed 1.0 s ago"),
        ({"payload": {"x": {1, 2}}}, "JSON"),
        ({"payload": {"x": float("nan")}}, "JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_a_reason(queue: QuickQueue, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        queue.submit(**{"kind": "fake", "payload": {}, **wrong})
    assert queue.depth()["queued"] == 0


# ── order ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_client_is_served_in_its_own_order(queue: QuickQueue) -> None:
    """ComfyUI's: by number, and `front` before all that waits."""
    for id, options in {
        "third": {},
        "fourth": {},
        "second": {"front": True},
        "first": {"front": True},
        "numbered": {"number": 1.5},  # the first two got the numbers 1 and 2
    }.items():
        queue.submit("graph", {}, id=id, **options)
    expected = ["first", "second", "third", "numbered", "fourth"]
    assert [job.id for job in queue.pending()] == expected
    assert [queue.position(id) for id in expected] == [0, 1, 2, 3, 4]
    assert [claimed(queue) for _ in expected] == expected
    assert queue.claim() is None


def test_a_higher_priority_goes_before_every_share_and_number(queue: QuickQueue) -> None:
    queue.submit("fake", {}, id="front", client="a", front=True)
    queue.submit("fake", {}, id="urgent", client="b", priority=1)
    queue.submit("fake", {}, id="urgent too", client="b", priority=1)
    assert [claimed(queue) for _ in range(3)] == ["urgent", "urgent too", "front"]


def test_front_is_before_the_clients_own_only(queue: QuickQueue) -> None:
    queue.submit("fake", {}, id="a1", client="a")
    queue.submit("fake", {}, id="b1", client="b")
    queue.submit("fake", {}, id="b2", client="b", front=True)
    queue.submit("fake", {}, id="b3", client="b", front=True)
    order = [job.id for job in queue.pending()]
    assert [id for id in order if id.startswith("b")] == ["b3", "b2", "b1"]
    assert order.index("a1") == 0, "oldest of the first turn"


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_queue_says_when_to_come_back(tmp_path: Path, clock: Clock) -> None:
    """Two run and each takes 30 s, so that one ends every 15 s."""
    queue = quick(tmp_path, clock, limit=3)
    for _ in range(2):
        queue.submit("fake", {})
        job = claimed(queue)
        clock.now += 30
        queue.finish(job, {})
    for _ in range(2):
        queue.submit("fake", {})
        claimed(queue)
    for _ in range(3):
        queue.submit("fake", {})
    with pytest.raises(QueueFullError, match=r"3 requests wait.* Try again in 15 s") as full:
        queue.submit("fake", {})
    assert full.value.retry_after == 15
    queue.close()
    again = quick(tmp_path, clock, limit=3)
    again.recover()
    with pytest.raises(QueueFullError) as full:
        again.submit("fake", {})
    assert full.value.retry_after == 30, "durations outlive the process; nothing runs now"
    again.close()


def test_one_client_cannot_fill_the_queue_where_it_is_limited(tmp_path: Path) -> None:
    queue = quick(tmp_path, limit=10, client_limit=2)
    for _ in range(2):
        queue.submit("fake", {}, client="greedy")
    with pytest.raises(QueueFullError, match="2 of your requests"):
        queue.submit("fake", {}, client="greedy")
    queue.submit("fake", {}, client="modest")
    queue.close()


def test_the_history_keeps_the_latest(tmp_path: Path, clock: Clock) -> None:
    queue = quick(tmp_path, clock, keep=3)
    for n in range(6):
        queue.submit("fake", {}, id=str(n))
    for _ in range(5):
        clock.now += 1
        queue.finish(claimed(queue), {})
    assert [job.id for job in queue.history()] == ["4", "3", "2"]
    assert queue.get("5") is not None, "what waits is no history"
    queue.close()


# ── deadlines ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_waits_past_its_deadline_fails_and_is_never_run(queue: QuickQueue, clock: Clock) -> None:
    queue.submit("fake", {}, id="late", deadline=clock.now + 5)
    queue.submit("fake", {}, id="later", deadline=clock.now + 9)
    queue.submit("fake", {}, id="patient")
    assert queue.next_deadline() == clock.now + 5
    assert queue.expire() == []
    clock.now += 5
    assert claimed(queue) == "later"
    (expired,) = queue.expire()
    assert (expired.id, expired.state, expired.finished) == ("late", "failed", clock.now)
    assert expired.error is not None
    assert expired.error["type"] == "DeadlineExceededError"
    assert "after 5.0 s in the queue" in expired.error["message"]
    assert queue.next_deadline() is None
    clock.now += 100
    assert queue.expire() == [], "what runs is told by its task"


# ── idempotency ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_key_gives_the_same_job(tmp_path: Path) -> None:
    queue = quick(tmp_path, limit=1)
    first = queue.submit("fake", {"a": 1, "b": 2}, client="Ann", idempotency_key="k")
    assert queue.submit("fake", {"b": 2, "a": 1}, client="Ann", idempotency_key="k") == first, "a full queue is no bar"
    claimed(queue)
    done = queue.finish(first.id, {"x": 1})
    assert queue.submit("fake", {"a": 1, "b": 2}, client="Ann", idempotency_key="k") == done
    other = queue.submit("fake", {"a": 1, "b": 2}, client="Bob", idempotency_key="k")
    assert other.id != first.id, "keys are each client's own"
    with pytest.raises(ConflictError, match="Use a new key"):
        queue.submit("fake", {"a": 3}, client="Ann", idempotency_key="k")
    with pytest.raises(ConflictError):
        queue.submit("other kind", {"a": 1, "b": 2}, client="Ann", idempotency_key="k")
    assert queue.counts()["queued"] == 1
    queue.close()


def test_a_fingerprint_is_compared_instead_of_the_payload(queue: QuickQueue) -> None:
    first = queue.submit("fake", {"upload": "/tmp/1"}, idempotency_key="k", fingerprint="as sent")
    again = queue.submit("fake", {"upload": "/tmp/2"}, idempotency_key="k", fingerprint="as sent")
    assert again == first
    with pytest.raises(ConflictError):
        queue.submit("fake", {"upload": "/tmp/1"}, idempotency_key="k", fingerprint="otherwise")


def test_an_id_is_given_once(queue: QuickQueue) -> None:
    queue.submit("fake", {}, id="one")
    with pytest.raises(ConflictError, match="id 'one'"):
        queue.submit("fake", {}, id="one")


# ── cancelling, and what no longer runs ──────────────────────────────────────────────────────────────────────────


def test_cancelling_says_what_it_met(queue: QuickQueue) -> None:
    waiting, running = queue.submit("fake", {}, number=2).id, queue.submit("fake", {}, number=1).id
    assert claimed(queue) == running
    assert (queue.cancel(waiting), queue.cancel(running), queue.cancel("nobody")) == ("queued", "running", None)
    assert (queue.cancelled(waiting), queue.cancelled(running), queue.cancelled("nobody")) == (True, True, False)
    stopped = queue.end_cancelled(running, {"half": 1})
    assert stopped is not None
    assert (stopped.state, stopped.result, stopped.cancelling) == ("cancelled", {"half": 1}, False)
    assert queue.cancel(running) is None


def test_what_finished_before_it_noticed_is_done(queue: QuickQueue) -> None:
    id = queue.submit("fake", {}).id
    claimed(queue)
    queue.cancel(id)
    finished = queue.finish(id, {"x": 1})
    assert finished is not None
    assert finished.state == "done"


def test_what_was_being_cancelled_does_not_go_back_to_the_queue(queue: QuickQueue) -> None:
    id = queue.submit("fake", {}).id
    claimed(queue)
    queue.cancel(id)
    stored = queue.requeue(id)
    assert stored is not None
    assert (stored.state, stored.cancelling) == ("cancelled", False)
    assert queue.claim() is None


def test_only_a_running_request_ends_or_makes_files(queue: QuickQueue, tmp_path: Path) -> None:
    id = queue.submit("fake", {}).id
    for act in (lambda: queue.finish(id, {}), lambda: queue.fail(id, {}), lambda: queue.requeue(id)):
        assert act() is None
    with pytest.raises(JobError, match="not running"):
        queue.note_file(id, tmp_path / "a.png")
    claimed(queue)
    assert queue.finish(id, {}) is not None
    assert queue.fail(id, {}) is None
    job = queue.get(id)
    assert job is not None
    assert job.state == "done"


def test_a_result_that_is_no_json_changes_nothing(queue: QuickQueue) -> None:
    id = queue.submit("fake", {}).id
    claimed(queue)
    with pytest.raises(RequestError, match="The result"):
        queue.finish(id, {"x": object()})
    assert queue.depth() == {"queued": 0, "running": 1}


def test_cancelling_all_that_waits_of_one_client_or_kind(queue: QuickQueue) -> None:
    for client, kind in itertools.product("ab", ["x", "y"]):
        queue.submit(kind, {}, id=client + kind, client=client)
    assert [job.id for job in queue.cancel_queued(kind="x", client="a")] == ["ax"]
    assert [job.id for job in queue.cancel_queued(client="b")] == ["bx", "by"]
    assert [job.id for job in queue.pending()] == ["ay"]


# ── the history ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_history_is_read_in_pages_and_thrown_away_by_id_or_whole(queue: QuickQueue, clock: Clock) -> None:
    for n in range(6):
        queue.submit("even" if n % 2 == 0 else "odd", {}, id=str(n), client="a" if n < 3 else "b", number=n)
    for n in range(5):
        job = claimed(queue)
        clock.now += 5 - n
        queue.fail(job, {}) if n == 2 else queue.finish(job, {})
    ids = lambda jobs: "".join(job.id for job in jobs)  # noqa: E731
    everything = ids(queue.history(newest_first=False))
    assert len(everything) == 5
    assert ids(queue.history()) == everything[::-1]
    pages = [ids(queue.history(limit=2, offset=offset)) for offset in range(0, 8, 2)]
    assert "".join(pages) == everything[::-1]
    assert pages[-1] == ""
    assert set(ids(queue.history("even"))) == {id for id in everything if int(id) % 2 == 0}
    assert set(ids(queue.history(client="a"))) == {id for id in everything if int(id) < 3}
    assert len(queue.history(states={"failed"})) == 1
    assert ids(queue.jobs({"done", "failed"}, sort_by="seconds", newest_first=False)) == everything[::-1]
    assert ids(queue.jobs(newest_first=False)) == "012345"
    waiting = (set("012345") - set(everything)).pop()
    assert queue.delete([everything[0], "nobody", waiting]) == 1
    assert queue.clear(states={"failed"}) == 1
    assert queue.clear() == 3
    assert ids(queue.jobs()) == waiting


def test_a_request_of_many_megabytes_is_refused(queue: QuickQueue) -> None:
    queue.submit("draw", {"prompt": "x" * (LARGEST_PAYLOAD - 100)})
    with pytest.raises(RequestError, match="4 are taken at most"):
        queue.submit("draw", {"prompt": "x" * LARGEST_PAYLOAD})
