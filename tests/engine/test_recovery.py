"""What the next process finds after the last one died."""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.engine.queue import Queue
from octavo.engine.service import Event, Service
from tests.engine import victim
from tests.engine.queues import Clock, QuickQueue, memory_folder, quick

KILLS = 20
PATIENCE = 60  # seconds that a subprocess may take on a busy machine


def reborn(queue: Queue, folder: Path, clock: Clock | None = None) -> QuickQueue:
    """The queue as the process after this one's death opens it."""
    queue.close()
    return quick(folder, clock)


def start(folder: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", victim.__name__, str(folder), name, *arguments]
    root = Path(victim.__file__).parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return output


# ── real processes ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


def test_killed_at_random_moments_nothing_is_lost_and_nothing_doubled(folder: Path) -> None:
    accepted: list[str] = []
    for n in range(KILLS):
        process = start(folder, f"run{n}")
        assert process.stdout is not None
        if n % 4:  # else it may be killed while it starts, or while it recovers
            assert process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0, 0.15))
        process.kill()
        output, errors = process.communicate(timeout=PATIENCE)
        assert "Traceback" not in errors
        # A last line that is cut short told nobody of a request.
        accepted += [line.strip() for line in output.splitlines(keepends=True) if "-" in line and line.endswith("\n")]
    finish(start(folder, "last", "drain"))

    queue = quick(folder)
    jobs = {job.id: job for job in queue.jobs()}
    queue.close()
    assert set(accepted) <= jobs.keys(), "nothing that was accepted is lost"
    assert {job.state for job in jobs.values()} <= {"done", "set_aside"}
    expected = [name for job in jobs.values() if job.result for name in job.result["files"]]
    assert len(expected) == victim.PICTURES * sum(job.state == "done" for job in jobs.values())
    found = {path.name: path.read_text() for path in (folder / "output").iterdir()}
    assert sorted(found) == sorted(expected), "and no picture is missing, left over or there twice"
    for name, text in found.items():
        assert text == name.rsplit("-", 1)[0] * victim.PARTS, "and each is whole"
    for job in jobs.values():
        assert job.attempts < 2 if job.state == "done" else (job.attempts == 2 and job.error)
    assert any(job.attempts for job in jobs.values()), "some were running when a process died"
    assert len(accepted) > KILLS


def test_a_request_that_kills_the_server_is_set_aside_and_takes_no_other_along(folder: Path) -> None:
    queue = quick(folder)
    innocent = [queue.submit("draw", {}, id=f"innocent-{n}").id for n in range(10)]
    queue.submit("killer", {}, id="killer", number=2.5)
    queue.close()
    deaths = 0
    while True:
        process = start(folder, "server", "drain")
        process.communicate(timeout=PATIENCE)
        if process.returncode == 0:
            break
        deaths += 1
        assert deaths <= 2
    queue = quick(folder)
    killer = queue.get("killer")
    assert killer is not None
    assert (deaths, killer.state, killer.attempts) == (2, "set_aside", 2)
    assert killer.error is not None
    assert "ended 2 times while this request ran" in killer.error["message"]
    assert {job.state for id in innocent if (job := queue.get(id))} == {"done"}
    assert len(list((folder / "output").iterdir())) == victim.PICTURES * len(innocent)
    queue.close()


# ── one rule at a time ───────────────────────────────────────────────────────────────────────────────────────────


def test_what_ran_waits_at_its_old_place(tmp_path: Path) -> None:
    queue = quick(tmp_path)
    for id in "abcd":
        queue.submit("fake", {}, id=id)
    queue.claim(), queue.claim()
    queue = reborn(queue, tmp_path)
    assert [job.id for job in queue.recover()] == ["a", "b"]
    assert [job.id for job in queue.pending()] == ["a", "b", "c", "d"]
    assert [job.attempts for job in queue.pending()] == [1, 1, 0, 0]
    queue.close()


def test_of_those_under_suspicion_one_runs_at_a_time(tmp_path: Path) -> None:
    queue = quick(tmp_path)
    for id in "abcd":
        queue.submit("fake", {}, id=id)
    for _ in range(3):
        queue.claim()
    queue = reborn(queue, tmp_path)
    queue.recover()
    claimed = [queue.claim() for _ in range(4)]
    assert [job.id if job else None for job in claimed] == ["a", "d", None, None]
    queue.finish("a", {})
    following = queue.claim()
    assert following is not None
    assert following.id == "b"
    assert queue.claim() is None
    queue = reborn(queue, tmp_path)
    assert {job.id: job.state for job in queue.recover()} == {"b": "set_aside", "d": "queued"}
    queue.close()


def test_those_under_suspicion_follow_each_other_without_new_requests(tmp_path: Path) -> None:
    queue = quick(tmp_path)
    for id in "abc":
        queue.submit("fake", {}, id=id)
    for _ in range(3):
        queue.claim()
    queue = reborn(queue, tmp_path)
    together, most = 0, 0
    lock = threading.Lock()

    def fake(_: object) -> dict[str, object]:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.01)
        with lock:
            together -= 1
        return {}

    events: list[Event] = []
    service = Service(queue, {"fake": fake}, workers=3)
    service.subscribe(events.append)
    service.start()
    for id in "abc":
        job = service.wait(id, PATIENCE)
        assert job is not None
        assert job.state == "done"
    service.stop()
    assert most == 1
    assert [event.job for event in events if event.type == "requeued"] == ["a", "b", "c"]
    assert all(event.data == {"attempts": 1} for event in events if event.type == "started")
    queue.close()


def test_set_aside_is_told_at_the_start(tmp_path: Path) -> None:
    queue = quick(tmp_path)
    queue.submit("fake", {}, id="a")
    for _ in range(2):
        queue.claim()
        queue = reborn(queue, tmp_path)
        if _ == 0:
            queue.recover()
    service = Service(queue, {})
    events: list[Event] = []
    service.subscribe(events.append)
    service.start()
    service.stop()
    (event,) = events
    assert (event.type, event.data["state"], event.data["error"]["type"]) == ("failed", "set_aside", "SetAside")
    queue.close()


def test_files_of_the_attempt_go_and_those_of_finished_requests_stay(tmp_path: Path) -> None:
    queue = quick(tmp_path)
    kept = []
    for id in ("done", "failed", "cancelled", "running"):
        queue.submit("fake", {}, id=id)
        queue.claim()
        path = tmp_path / f"{id} \udce9.png"  # a name that is not UTF-8
        queue.note_file(id, path)
        queue.note_file(id, path)
        path.write_text("x")
        kept.append(path)
    not_made = tmp_path / "not made.png"
    queue.note_file("running", not_made)
    queue.finish("done", {})
    queue.fail("failed", {"type": "X", "message": "no"})
    queue.end_cancelled("cancelled")
    queue = reborn(queue, tmp_path)
    queue.recover()
    assert [path.exists() for path in kept] == [True, True, True, False]
    queue.claim()
    queue.note_file("running", kept.pop()), queue.note_file("running", not_made)
    queue.close()


def test_a_file_that_is_there_is_nobodys_to_remove(tmp_path: Path) -> None:
    """Neither what a user has put there nor what another request reserved."""
    queue = quick(tmp_path)
    for id in "ab":
        queue.submit("fake", {}, id=id)
        queue.claim()
    users, reserved = tmp_path / "mine.png", tmp_path / "reserved.png"
    users.write_text("x")
    queue.note_file("a", reserved)
    for path in (users, reserved):
        with pytest.raises(FileExistsError, match="taken"):
            queue.note_file("b", path)
    queue = reborn(queue, tmp_path)
    queue.recover()
    assert users.exists()
    queue.close()


def test_a_name_is_free_again_after_its_file_is_gone(tmp_path: Path) -> None:
    queue = quick(tmp_path)
    path = tmp_path / "a.png"
    for id in "ab":
        queue.submit("fake", {}, id=id)
        queue.claim()
        queue.note_file(id, path)
        path.write_text(id)
        queue.finish(id, {})
        path.unlink()
    queue.close()


def test_a_file_that_cannot_be_removed_is_logged_and_holds_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue = quick(tmp_path)
    queue.submit("fake", {}, id="a")
    queue.claim()
    path = tmp_path / "became a folder"
    queue.note_file("a", path)
    path.mkdir()
    queue = reborn(queue, tmp_path)
    assert [job.state for job in queue.recover()] == ["queued"]
    assert f"Could not remove {path}" in caplog.text
    queue.close()


def test_what_was_being_cancelled_is_not_run_again(tmp_path: Path) -> None:
    queue = quick(tmp_path)
    queue.submit("fake", {}, id="a")
    queue.claim()
    queue.cancel("a")
    queue = reborn(queue, tmp_path)
    assert [job.state for job in queue.recover()] == ["cancelled"]
    assert queue.claim() is None
    queue.close()


def test_a_deadline_that_passed_meanwhile_counts(tmp_path: Path) -> None:
    clock = Clock()
    queue = quick(tmp_path, clock)
    queue.submit("fake", {}, id="a", deadline=clock.now + 5)
    queue.claim()
    clock.now += 10
    queue = reborn(queue, tmp_path, clock)
    assert [job.state for job in queue.recover()] == ["queued"]
    assert queue.claim() is None
    assert [job.state for job in queue.expire()] == ["failed"]
    queue.close()


def test_the_place_of_the_removed_is_forgotten_too(tmp_path: Path) -> None:
    """A death between removing files and writing that down is a death like any other."""
    queue = quick(tmp_path)
    queue.submit("fake", {}, id="a")
    queue.claim()
    path = tmp_path / "a.png"
    queue.note_file("a", path)
    path.write_text("half")
    queue = reborn(queue, tmp_path)
    path.unlink()
    (job,) = queue.recover()
    assert (job.state, job.attempts) == ("queued", 1)
    queue.close()
