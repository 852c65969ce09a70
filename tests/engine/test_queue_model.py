"""The queue against a model of a few dictionaries, under every order of events that hypothesis thinks of.

A "death" here closes the file with requests still running, which is all that the next process sees of a real one;
`test_recovery` kills real processes.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from octavo.errors import ConflictError, QueueFullError
from tests.engine.queues import Clock, memory_folder, quick

LIMIT = 6
CLIENTS = st.sampled_from(["", "Ann", "Bob"])


@dataclass
class Job:
    id: str
    client: str
    priority: int
    number: float
    age: int
    deadline: float | None
    state: str = "queued"
    attempts: int = 0
    cancelling: bool = False
    left: bool = False
    files: list[Path] = field(default_factory=list)


class AgainstModel(RuleBasedStateMachine):
    known = Bundle("known")  # ids
    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = ExitStack()
        self.folder = self.cleanup.enter_context(memory_folder())
        self.clock = Clock()
        self.queue = quick(self.folder, self.clock, limit=LIMIT)
        self.model: dict[str, Job] = {}
        self.keys: dict[tuple[str, str], tuple[str, int]] = {}
        self.accepted = 0
        self.files = 0

    def teardown(self) -> None:
        self.queue.close()
        self.cleanup.close()

    def of(self, *states: str) -> list[Job]:
        return [job for job in self.model.values() if job.state in states]

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(
        target=known,
        client=CLIENTS,
        priority=st.integers(0, 1),
        front=st.booleans(),
        life=st.none() | st.integers(1, 20),
    )
    def submit(self, client: str, priority: int, front: bool, life: int | None) -> object:
        deadline = None if life is None else self.clock.now + life
        try:
            job = self.queue.submit(
                "fake", {"n": self.accepted}, client=client, priority=priority, front=front, deadline=deadline
            )
        except QueueFullError:
            assert len(self.of("queued")) >= LIMIT
            return multiple()
        assert len(self.of("queued")) < LIMIT
        self.accepted += 1
        age = self.accepted
        self.model[job.id] = Job(job.id, client, priority, -age if front else age, age, deadline)
        return job.id

    @rule(target=known, client=CLIENTS, key=st.sampled_from("xy"), content=st.integers(0, 1))
    def submit_with_a_key(self, client: str, key: str, content: int) -> object:
        earlier = self.keys.get((client, key))
        if earlier is not None and earlier[0] not in self.model:
            earlier = None  # deleted from the history, and its key with it
        try:
            job = self.queue.submit("fake", {"content": content}, client=client, idempotency_key=key)
        except ConflictError:
            assert earlier is not None
            assert earlier[1] != content
            return multiple()
        except QueueFullError:
            assert earlier is None
            assert len(self.of("queued")) >= LIMIT
            return multiple()
        if earlier is not None:
            assert (job.id, content) == earlier
            return multiple()
        self.accepted += 1
        self.keys[client, key] = (job.id, content)
        self.model[job.id] = Job(job.id, client, 0, self.accepted, self.accepted, None)
        return job.id

    @rule(target=running)
    def claim(self) -> object:
        suspect_runs = any(job.attempts for job in self.of("running"))
        able = [
            job
            for job in self.of("queued")
            if (job.deadline is None or job.deadline > self.clock.now) and not (job.attempts and suspect_runs)
        ]
        foretold = [job.id for job in self.queue.pending()]
        job = self.queue.claim()
        if job is None:
            assert not able
            return multiple()
        mine = self.model[job.id]
        assert mine in able
        assert mine.priority == max(other.priority for other in able)
        rivals = [other for other in able if other.priority == mine.priority]
        assert mine == min((r for r in rivals if r.client == mine.client), key=lambda r: (r.number, r.age))
        served = [sum(other.client == client for other in self.of("running")) for client in {r.client for r in rivals}]
        assert sum(other.client == mine.client for other in self.of("running")) == min(served)
        if len(able) == len(self.of("queued")):
            assert foretold[0] == job.id
        mine.state = "running"
        return job.id

    @rule(id=running)
    def make_a_file(self, id: str) -> None:
        job = self.model.get(id)
        if job is None or job.state != "running":
            return
        self.files += 1
        path = self.folder / f"{self.files}.png"
        self.queue.note_file(id, path)
        path.write_text(id)
        job.files.append(path)

    @rule(id=running, other=running)
    def take_a_name_that_is_taken(self, id: str, other: str) -> None:
        if id in self.model and other in self.model and self.model[id].state == self.model[other].state == "running":
            for path in self.model[other].files if id != other else []:
                with pytest.raises(FileExistsError):
                    self.queue.note_file(id, path)

    @rule(id=consumes(running), way=st.sampled_from(["finish", "fail", "end_cancelled", "requeue"]))
    def end(self, id: str, way: str) -> None:
        job = self.model.get(id)
        arguments = {"finish": ({"x": 1},), "fail": ({"type": "X", "message": "no"},)}.get(way, ())
        ended = getattr(self.queue, way)(id, *arguments)
        if job is None or job.state != "running":
            assert ended is None
            return
        if way == "requeue":
            job.files.clear()
            way = "end_cancelled" if job.cancelling else way
        job.state = {"finish": "done", "fail": "failed", "end_cancelled": "cancelled", "requeue": "queued"}[way]
        job.cancelling = job.left = False
        assert ended.state == job.state

    @rule(id=known)
    def cancel(self, id: str) -> None:
        job = self.model.get(id)
        was = self.queue.cancel(id)
        if job is None or job.state not in ("queued", "running"):
            assert was is None
        elif job.state == "queued":
            assert was == "queued"
            job.state, job.cancelling = "cancelled", False
        else:
            assert was == "running"
            job.cancelling = True

    @rule(seconds=st.integers(1, 15))
    def time_passes(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def expire(self) -> None:
        late = {job.id for job in self.of("queued") if job.deadline is not None and job.deadline <= self.clock.now}
        assert {job.id for job in self.queue.expire()} == late
        for id in late:
            self.model[id].state = "failed"

    @rule(id=running)
    def leave(self, id: str) -> None:
        self.queue.leave(id)
        if id in self.model and self.model[id].state == "running":
            self.model[id].left = True

    @rule()
    def die_and_recover(self) -> None:
        self.queue.close()
        self.queue = quick(self.folder, self.clock, limit=LIMIT)
        recovered = {job.id: job.state for job in self.queue.recover()}
        assert recovered.keys() == {job.id for job in self.of("running")}
        for job in self.of("running"):
            job.files.clear()
            job.attempts += not job.left
            job.left = False
            job.state = "cancelled" if job.cancelling else "set_aside" if job.attempts >= 2 else "queued"
            job.cancelling = False
            assert recovered[job.id] == job.state
        assert self.queue.recover() == []

    @precondition(lambda self: self.of("running"))
    @rule()
    def recovering_twice_touches_nothing_that_runs(self) -> None:
        if not any(job.left for job in self.of("running")):
            assert self.queue.recover() == []

    @rule(id=known)
    def delete(self, id: str) -> None:
        over = id in self.model and self.model[id].state not in ("queued", "running")
        assert self.queue.delete([id]) == over
        if over:
            del self.model[id]

    # ── what always holds ────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def every_request_is_where_the_model_has_it(self) -> None:
        found = {job.id: (job.state, job.attempts, job.cancelling) for job in self.queue.jobs()}
        assert found == {job.id: (job.state, job.attempts, job.cancelling) for job in self.model.values()}
        counts = self.queue.counts()
        assert all(counts[state] == len(self.of(state)) for state in counts)
        assert self.queue.depth() == {state: len(self.of(state)) for state in ("queued", "running")}
        assert {job.id for job in self.queue.pending()} == {job.id for job in self.of("queued")}

    @invariant()
    def what_is_over_says_why_and_when(self) -> None:
        for job in self.queue.history():
            assert job.finished is not None
            assert (job.error is not None) == (job.state in ("failed", "set_aside"))

    @invariant()
    def files_are_those_of_attempts_that_count(self) -> None:
        """Of deleted requests as well: only the entry in the history goes."""
        kept = {path for job in self.model.values() for path in job.files}
        assert kept <= set(self.folder.glob("*.png"))
        unfinished = [job for job in self.of("queued", "set_aside") if job.files]
        assert not unfinished

    @invariant()
    def no_file_of_a_lost_attempt_remains(self) -> None:
        kept = {path for job in self.model.values() for path in job.files}
        for path in set(self.folder.glob("*.png")) - kept:
            assert path.read_text() not in self.model, "made by a request whose attempt did not finish"


AgainstModel.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestAgainstModel = AgainstModel.TestCase
