"""The queue's file: SQLite, opened by one process at a time, brought up to date, never thrown away.

A transaction that is committed outlives the process at once. It outlives a power cut once `sync` has returned: the
write-ahead log is flushed there and not in the commit (SQLite's `synchronous` is NORMAL, and the flush is the one that
FULL would add), so that threads that commit at the same time share one flush, and none holds the lock meanwhile.

What the tables mean is in `queue`.
"""

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from octavo.errors import QueueBusyError, QueueFileError

APPLICATION_ID = 0x4F637476  # "Octv", in the header of every queue file
flush = getattr(os, "fdatasync", os.fsync)  # as SQLite does: a file's times need not be on the disk
WRITER_PATIENCE = 5.0  # seconds that another program, such as a database browser, may hold the file's write lock

# Each entry leads from one version of the tables to the next; `user_version` in the file counts those done. An entry
# that was released is never edited: what changes is added below it. Long texts are a row's last columns, for SQLite
# reads a row from the front; indices hold all that claiming and counting need.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            kind TEXT NOT NULL,
            client TEXT NOT NULL,
            api TEXT NOT NULL,
            state TEXT NOT NULL,
            priority INTEGER NOT NULL,
            number REAL NOT NULL,
            created REAL NOT NULL,
            started REAL,
            finished REAL,
            deadline REAL,
            attempts INTEGER NOT NULL DEFAULT 0,
            session TEXT,
            cancelling INTEGER NOT NULL DEFAULT 0,
            idempotency_key TEXT,
            fingerprint TEXT,
            payload TEXT NOT NULL,
            result TEXT,
            error TEXT
        )""",
        "CREATE UNIQUE INDEX jobs_key ON jobs (client, idempotency_key) WHERE idempotency_key IS NOT NULL",
        "CREATE INDEX jobs_queued ON jobs (priority, client, number, seq, deadline, attempts) WHERE state = 'queued'",
        "CREATE INDEX jobs_running ON jobs (started) WHERE state = 'running'",
        "CREATE INDEX jobs_over ON jobs (finished, seq) WHERE finished IS NOT NULL",
        "CREATE INDEX jobs_state ON jobs (state, kind, client)",
        "CREATE TABLE files (path BLOB PRIMARY KEY, job INTEGER NOT NULL)",
        "CREATE INDEX files_job ON files (job)",
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    ),
)


class Store:
    """An open queue file; its methods may be called from any thread.

    Args:
        path: of the file; it and its folder are made where they are not there.

    Raises:
        QueueBusyError: another `Store` has the file, in this process or another.
        QueueFileError: the file is damaged, is something else, was written by a newer Octavo, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()
        self._turn = threading.RLock()  # one connection serves all threads
        self._flush = threading.Lock()
        self._commits = 0  # counted under `_turn`
        self._flushed = 0  # how many of them the disk has
        self._log: int | None = None  # descriptor of the write-ahead log
        self._db: sqlite3.Connection | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Not thread-local: it is released by whichever thread closes.
            self._lock = FileLock(f"{self.path}.lock", thread_local=False)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise QueueBusyError(
                f"The queue {self.path} is in use by {_holder(self.path)}. Stop that server, or give this one a queue "
                f"file of its own."
            ) from None
        except OSError as error:
            raise QueueFileError(f"The queue {self.path} cannot be opened: {error}. Choose another place.") from error
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block's changes, or none; others wait meanwhile.

        Raises:
            QueueFileError: the file is closed, damaged, or cannot be written.
        """
        with self._turn, self._explained():
            db = self._connection()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors; a second time is an error of its own.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            self._commits += 1

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The tables as of the last commit.

        Raises:
            QueueFileError: the file is closed or damaged.
        """
        with self._turn, self._explained():
            yield self._connection()

    def sync(self) -> None:
        """Return when everything committed so far outlives a power cut.

        Raises:
            QueueFileError: the disk refuses.
        """
        with self._turn:
            mine = self._commits
        with self._flush:
            if self._flushed >= mine:
                return  # another thread's flush began after our commit
            with self._turn:
                reached = self._commits
            if self._log is None:
                raise QueueFileError(f"The queue {self.path} is closed.")
            try:
                flush(self._log)
            except OSError as error:
                raise QueueFileError(f"The queue {self.path} cannot be written: {error}.") from error
            self._flushed = reached

    def close(self) -> None:
        """Give the file up, for another process to open; closing twice is harmless."""
        with self._flush, self._turn:
            if self._log is not None:
                os.close(self._log)
                self._log = None
            if self._db is not None:
                self._db.close()
                self._db = None
        self._lock.release()

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise QueueFileError(f"The queue {self.path} is closed.")
        return self._db

    def _open(self) -> None:
        with self._explained():
            self._db = db = sqlite3.connect(
                self.path, timeout=WRITER_PATIENCE, isolation_level=None, check_same_thread=False
            )
            db.row_factory = sqlite3.Row
            self._check()  # before anything of it is changed
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # see the module's docstring
            self._migrate()
            with self.transaction():
                holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
                db.execute("INSERT OR REPLACE INTO meta VALUES ('holder', ?)", (holder,))
        self._log = os.open(f"{self.path}-wal", os.O_RDWR | getattr(os, "O_BINARY", 0))
        _flush_folder(self.path.parent)

    def _check(self) -> None:
        """Raise unless the file is sound and ours, of this version or an older one."""
        db = self._connection()
        version = db.execute("PRAGMA user_version").fetchone()[0]
        owner = db.execute("PRAGMA application_id").fetchone()[0]
        if owner != APPLICATION_ID and db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            raise QueueFileError(
                f"{self.path} is a database of another program, not Octavo's queue. Give the queue another name."
            )
        if version > len(MIGRATIONS):
            raise QueueFileError(
                f"The queue {self.path} was written by a newer Octavo (version {version} of its tables; this one "
                f"knows up to {len(MIGRATIONS)}). Update Octavo, or give this server a queue file of its own."
            )
        verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise self._damaged(" ".join(verdict.split()))

    def _migrate(self) -> None:
        db = self._connection()
        done = db.execute("PRAGMA user_version").fetchone()[0]
        for version, statements in enumerate(MIGRATIONS[done:], start=done + 1):
            with self.transaction():
                for statement in statements:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {version}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into ours; a broken rule of the tables (IntegrityError) is our own mistake and stays."""
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            # Only errors that come from SQLite carry a code; its low byte is the kind.
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._damaged(str(error)) from error
            remedy = {
                sqlite3.SQLITE_FULL: "Make room on the disk.",
                sqlite3.SQLITE_READONLY: "Make the file and its folder writable, or choose another place.",
                sqlite3.SQLITE_BUSY: "Another program holds it, perhaps a database browser; close that.",
                sqlite3.SQLITE_CANTOPEN: "Check that the folder exists and may be written, or choose another place.",
            }.get(code, "Check the disk.")
            raise QueueFileError(f"The queue {self.path} cannot be used: {error}. {remedy}") from error

    def _damaged(self, verdict: str) -> QueueFileError:
        return QueueFileError(
            f"The queue {self.path} is damaged ({verdict}). Nothing was deleted. To save what is readable, run: "
            f"sqlite3 '{self.path}' .recover | sqlite3 saved.sqlite3 . To start with an empty queue, move the file "
            f"away, together with those of the same name that end in -wal and -shm."
        )


def _holder(path: Path) -> str:
    """Who wrote into the file that it has it; read without a lock, so it may be a moment behind."""
    with (
        suppress(sqlite3.Error),
        closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=1.0)) as db,
    ):
        row = db.execute("SELECT value FROM meta WHERE name = 'holder'").fetchone()
        if row:
            return str(row[0])
    return "another process"


def _flush_folder(folder: Path) -> None:
    """Make the names of new files outlive a power cut, where the system has a way to ask for it."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
