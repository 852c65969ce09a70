"""The queue's file: who may open it, what becomes of a damaged one, and when something is stored."""

import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from octavo.engine import store as store_module
from octavo.engine.queue import Queue
from octavo.engine.store import APPLICATION_ID, MIGRATIONS, Store
from octavo.errors import QueueBusyError, QueueFileError
from tests.engine.queues import QuickQueue, quick

# ── the file ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_queue_on_the_file_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    queue = quick(tmp_path)
    with pytest.raises(QueueBusyError, match=rf"in use by process {os.getpid()} on .* Stop that server"):
        quick(tmp_path)
    queue.submit("fake", {})
    queue.close()
    queue.close()
    quick(tmp_path).close()


def test_a_second_process_on_the_file_is_refused(tmp_path: Path) -> None:
    queue = quick(tmp_path)
    script = "import sys; from pathlib import Path; from octavo.engine.queue import Queue; Queue(Path(sys.argv[1]))"
    other = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "queue.sqlite3")], capture_output=True, text=True, timeout=60
    )
    assert other.returncode != 0
    assert f"QueueBusyError: The queue {tmp_path / 'queue.sqlite3'} is in use by process {os.getpid()}" in other.stderr
    queue.submit("fake", {})
    queue.close()


def test_a_closed_queue_says_so(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.sqlite3")
    queue.close()
    for act in (lambda: queue.submit("fake", {}), queue.depth, queue.sync):
        with pytest.raises(QueueFileError, match="closed"):
            act()


def overwrite_all(path: Path) -> None:
    path.write_bytes(b"this is no database at all" * 400)


def overwrite_middle(path: Path) -> None:
    with path.open("r+b") as file:
        for page in range(1, path.stat().st_size // 4096):
            file.seek(page * 4096)
            file.write(b"\xff" * 100)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


@pytest.mark.parametrize("damage", [overwrite_all, overwrite_middle, cut_off])
def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "queue.sqlite3"
    queue = quick(tmp_path)
    for n in range(40):
        queue.submit("fake", {"text": "x" * 500, "n": n})
    queue.close()
    damage(path)
    before = path.read_bytes()
    for _ in range(2):  # and the lock is given back
        with pytest.raises(QueueFileError, match=r"is damaged \(.*Nothing was deleted.*\.recover.*move the file away"):
            quick(tmp_path)
    assert path.read_bytes() == before


def test_damage_far_from_what_opening_reads_is_found(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    queue = quick(tmp_path)
    for n in range(40):
        queue.submit("fake", {"text": "x" * 500, "n": n})
    queue.close()
    page = path.read_bytes().index(b'"n":20') // 4096
    with path.open("r+b") as file:
        file.seek(page * 4096 + 3)  # where the page says how many rows it has
        file.write(b"\x7f\xff")
    with pytest.raises(QueueFileError, match="is damaged"):
        quick(tmp_path)


def test_another_programs_database_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE jobs (mine TEXT)")
    db.close()
    with pytest.raises(QueueFileError, match="another program"):
        quick(tmp_path)


def test_a_newer_file_is_not_touched(tmp_path: Path) -> None:
    quick(tmp_path).close()
    db = sqlite3.connect(tmp_path / "queue.sqlite3")
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(QueueFileError, match="newer Octavo"):
        quick(tmp_path)


def test_an_older_file_is_brought_up_to_date_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = quick(tmp_path)
    id = queue.submit("fake", {"a": 1}).id
    queue.close()
    step = ("ALTER TABLE jobs ADD COLUMN colour TEXT DEFAULT 'red'",)
    monkeypatch.setattr(store_module, "MIGRATIONS", (*MIGRATIONS, step))
    for _ in range(2):
        queue = quick(tmp_path)
        job = queue.get(id)
        assert job is not None
        assert job.payload == {"a": 1}
        queue.close()
    with sqlite3.connect(tmp_path / "queue.sqlite3") as db:
        assert db.execute("SELECT colour FROM jobs").fetchall() == [("red",)]
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)
        assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    db.close()


def test_a_migration_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(tmp_path).close()
    broken = ("ALTER TABLE jobs ADD COLUMN colour TEXT", "ALTER TABLE nothing ADD COLUMN colour TEXT")
    monkeypatch.setattr(store_module, "MIGRATIONS", (*MIGRATIONS, broken))
    with pytest.raises(QueueFileError, match="nothing"):
        quick(tmp_path)
    monkeypatch.undo()
    quick(tmp_path).close()


@pytest.mark.parametrize("name", ["file/queue.sqlite3", "folder"])
def test_a_place_that_cannot_hold_the_file_is_explained(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(QueueFileError, match=r"cannot be (opened|used)"):
        QuickQueue(tmp_path / name)


def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path) -> None:
    queue = quick(tmp_path)
    kept = queue.submit("fake", {}).id
    with queue._store.reading() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")  # as SQLite meets a disk without room
    with pytest.raises(QueueFileError, match="Make room on the disk"):
        queue.submit("fake", {"text": "x" * 100_000})
    assert [job.id for job in queue.pending()] == [kept]
    queue.close()


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "queue.sqlite3")

    def half() -> None:
        with store.transaction() as db:
            db.execute("INSERT INTO meta VALUES ('half', 'done')")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    with store.reading() as db:
        assert db.execute("SELECT 1 FROM meta WHERE name = 'half'").fetchone() is None
    store.close()


def test_submitting_returns_after_the_log_reached_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(tmp_path / "queue.sqlite3")
    log = os.stat(tmp_path / "queue.sqlite3-wal").st_ino
    flushed: list[int] = []  # how long the log was whenever it was flushed

    def watch(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == log:
            flushed.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(store_module, "flush", watch)
    queue.submit("fake", {"n": 1})
    assert flushed == [os.path.getsize(tmp_path / "queue.sqlite3-wal")]
    queue.sync()
    assert len(flushed) == 1, "nothing was written since"
    queue.close()


def test_threads_that_submit_at_once_share_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one flush is under way all others commit; the next flush serves them together."""
    queue = Queue(tmp_path / "queue.sqlite3")
    submitters = 20
    others_committed = threading.Event()
    flushes: list[int] = []

    def slow(_: int) -> None:
        flushes.append(1)
        assert others_committed.wait(20)

    monkeypatch.setattr(store_module, "flush", slow)
    threads = [threading.Thread(target=queue.submit, args=("fake", {})) for _ in range(submitters)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        if queue.depth()["queued"] == submitters:
            break
        threading.Event().wait(0.01)
    others_committed.set()
    for thread in threads:
        thread.join(20)
    assert queue.depth()["queued"] == submitters
    assert len(flushes) == 2
    queue.close()


def test_what_the_disk_refuses_is_not_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(tmp_path / "queue.sqlite3")

    def refuse(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store_module, "flush", refuse)
    with pytest.raises(QueueFileError, match=r"cannot be written: .*Input/output error"):
        queue.submit("fake", {})
    queue.close()
