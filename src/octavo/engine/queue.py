"""The durable queue: what was accepted is finished exactly once, or said to have failed and why.

    queued ──claim──▶ running ──finish──▶ done
      │                  │ ├────fail────▶ failed
      │                  │ ├───cancel───▶ cancelled
      │                  │ └───requeue──▶ queued            the server stops in good order
      │                  └── (a process dies) ──recover──▶ queued, the second time set_aside
      ├──cancel──▶ cancelled
      └──expire──▶ failed

`submit` returns once the request outlives a power cut. Before a runner makes an output file it calls `note_file`;
what an attempt that did not finish has noted is removed before the request is run again, so that no picture appears
twice. `service` runs the workers; `shares` says whose turn it is; `store` keeps the file.
"""

import math
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Unpack

from octavo.engine import noted
from octavo.engine.jobs import Options, Order, State, Stored, to_json
from octavo.engine.records import Records, forget_oldest, matching, row_of, running_row
from octavo.engine.shares import Shares
from octavo.engine.store import Store
from octavo.errors import ConflictError, JobError, QueueFullError, RequestError

DEATHS = 2  # of processes while a request ran; then it is set aside
UNKNOWN_WAIT = 5  # seconds to come back after, while no request has finished yet
LONGEST_WAIT = 600  # seconds; nobody is told to come back later than that
RECENT = 50  # finished requests from whose durations waiting times are estimated


class Queue(Records):
    """Requests in a file that outlives the process; every method may be called from any thread.

    Args:
        path: of the SQLite file; made where it is not there.
        limit: how many requests may wait.
        client_limit: how many of one client may wait; None: as many as of all.
        keep: how many requests that are over stay in the history; None: all.
        clock: seconds since 1970.

    Raises:
        QueueBusyError: another queue has the file.
        QueueFileError: the file is damaged, foreign, of a newer version, or cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        limit: int = 1000,
        client_limit: int | None = None,
        keep: int | None = 10_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limit, self.client_limit, self.keep, self.clock = limit, client_limit, keep, clock
        self._session = uuid.uuid4().hex  # tells this process's running requests from those of a dead one
        self._shares = Shares()
        self._turn = threading.Lock()  # guards the shares; taken before the store's lock, never after
        super().__init__(Store(path))
        with self._store.reading() as db:
            rows = db.execute(
                "SELECT finished - started FROM jobs WHERE finished IS NOT NULL AND state = 'done' "
                "ORDER BY finished DESC LIMIT ?",
                (RECENT,),
            ).fetchall()
        self._durations = deque((row[0] for row in reversed(rows)), maxlen=RECENT)

    # ── in ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, kind: str, payload: Mapping[str, Any], **options: Unpack[Options]) -> Stored:
        """Accept a request; when this returns, it is stored for good.

        Args:
            kind: which runner is to do it.
            payload: plain JSON for the runner.
            options: the fields of `Order`.

        Returns:
            The new job, or the one that this client submitted under the same idempotency key before.

        Raises:
            RequestError: an option or the payload cannot be stored, or the deadline is past.
            ConflictError: the id is taken, or the idempotency key stands for a different request.
            QueueFullError: too many wait.
            QueueFileError: the file cannot be written.
        """
        stored, _ = self.add(Order(kind=kind, payload=payload, **options))
        self.sync()
        return stored

    def add(self, order: Order) -> tuple[Stored, bool]:
        """As `submit`, but stored for good only after the next `sync`; says whether the job is new."""
        now = self.clock()
        with self._store.transaction() as db:
            if order.idempotency_key is not None:
                earlier = db.execute(
                    "SELECT * FROM jobs WHERE client = ? AND idempotency_key = ?", (order.client, order.idempotency_key)
                ).fetchone()
                if earlier and earlier["fingerprint"] != order.compared:
                    raise ConflictError(
                        f"The idempotency key '{order.idempotency_key}' was used for a different request. Use a new "
                        f"key for a new request."
                    )
                if earlier:
                    return Stored.of(earlier), False
            if order.deadline is not None and order.deadline <= now:
                raise RequestError(f"The deadline passed {now - order.deadline:.1f} s ago; give a later one, or none.")
            if db.execute("SELECT 1 FROM jobs WHERE id = ?", (order.id,)).fetchone():
                raise ConflictError(f"There is a request with the id '{order.id}' already; use a new id.")
            self._check_room(db, order.client)
            row = db.execute(
                "INSERT INTO jobs (id, kind, payload, client, api, state, priority, number, created, deadline,"
                " idempotency_key, fingerprint) VALUES (?, ?, ?, ?, ?, 'queued', ?, 0, ?, ?, ?, ?) RETURNING seq",
                (
                    *(order.id, order.kind, order.text, order.client, order.api, order.priority, now, order.deadline),
                    *(order.idempotency_key, None if order.idempotency_key is None else order.compared),
                ),
            ).fetchone()
            seq = row["seq"]
            number = order.number if order.number is not None else float(-seq if order.front else seq)
            db.execute("UPDATE jobs SET number = ? WHERE seq = ?", (number, seq))
            return row_of(db, seq), True

    def sync(self) -> None:
        """Return when everything so far outlives a power cut; killing the process alone never loses anything."""
        self._store.sync()

    # ── through ──────────────────────────────────────────────────────────────────────────────────────────────────

    def claim(self) -> Stored | None:
        """The request whose turn it is, now running; None where none may run.

        Highest priority first, then the client whose turn it is (`shares`), then the smallest number, then the
        oldest. Of the requests that ran when a process died only one runs at a time: if one of them is the cause, the
        next death does not cast suspicion on the others again.
        """
        now = self.clock()
        with self._turn:
            with self._store.transaction() as db:
                suspect_runs = db.execute("SELECT 1 FROM jobs WHERE state = 'running' AND attempts > 0").fetchone()
                may_run = "state = 'queued' AND (deadline IS NULL OR deadline > ?)"
                if suspect_runs:
                    may_run += " AND attempts = 0"
                heads = db.execute(
                    f"SELECT client, seq FROM (SELECT client, seq, ROW_NUMBER() OVER (PARTITION BY client"
                    f" ORDER BY number, seq) AS place FROM jobs WHERE {may_run}"
                    f" AND priority = (SELECT priority FROM jobs INDEXED BY jobs_queued WHERE {may_run}"
                    f" ORDER BY priority DESC LIMIT 1)) WHERE place = 1",
                    (now, now),
                ).fetchall()
                if not heads:
                    return None
                ages = {row["client"]: row["seq"] for row in heads}
                client = self._shares.choose(ages)
                db.execute(
                    "UPDATE jobs SET state = 'running', started = ?, session = ? WHERE seq = ?",
                    (now, self._session, ages[client]),
                )
                stored = row_of(db, ages[client])
            self._shares.started(client)
        return stored

    def note_file(self, id: str, path: Path) -> None:
        """Reserve the name of a file that this request is about to make; call it before the file appears.

        If the attempt does not finish, the file is removed before the request is run again. A file written under a
        temporary name first needs that name noted too.

        Raises:
            FileExistsError: the file exists, or another running request has reserved it; take another name.
            JobError: the request is not running.
        """
        with self._store.transaction() as db:
            row = running_row(db, id)
            if row is None:
                raise JobError(f"The request {id} is not running; it may make no file.")
            noted.note(db, row["seq"], path)
        self.sync()

    def finish(self, id: str, result: Mapping[str, Any]) -> Stored | None:
        """Done, with its result; None where the request does not run (any more).

        Raises:
            RequestError: the result is not plain JSON.
        """
        return self._end(id, "done", result=result)

    def fail(self, id: str, error: Mapping[str, Any], result: Mapping[str, Any] | None = None) -> Stored | None:
        """Failed, with the reason; None where the request does not run. Files it made stay.

        Args:
            error: {"type", "message"} and what else there is to say.
            result: what the request had made by then.
        """
        return self._end(id, "failed", result=result, error=error)

    def end_cancelled(self, id: str, result: Mapping[str, Any] | None = None) -> Stored | None:
        """A running request has stopped since it was cancelled; None where it does not run."""
        return self._end(id, "cancelled", result=result)

    def requeue(self, id: str) -> Stored | None:
        """A running request goes back to its place in the queue, without its files; None where it does not run.

        One that was being cancelled is cancelled instead.
        """
        with self._store.transaction() as db:
            row = running_row(db, id)
            if row is None:
                return None
            noted.remove(db, row["seq"])
            if row["cancelling"]:
                self._close(db, row["seq"], "cancelled")
            else:
                db.execute("UPDATE jobs SET state = 'queued', started = NULL WHERE seq = ?", (row["seq"],))
            stored = row_of(db, row["seq"])
        with self._turn:
            self._shares.ended(row["client"], self.clock() - row["started"])
        return stored

    def leave(self, id: str) -> None:
        """A running request that cannot be stopped: the end of this process is not to be counted as a death."""
        with self._store.transaction() as db:
            db.execute("UPDATE jobs SET session = 'left' WHERE id = ? AND state = 'running'", (id,))

    def cancel(self, id: str) -> Literal["queued", "running"] | None:
        """Cancel a request.

        Returns:
            The state it had: "queued", and it is cancelled; "running", and `cancelled` is true from now on; None
            where it is over or unknown, and nothing changed.
        """
        with self._store.transaction() as db:
            row = db.execute("SELECT seq, state FROM jobs WHERE id = ?", (id,)).fetchone()
            if row is None or row["state"] not in ("queued", "running"):
                return None
            if row["state"] == "running":
                db.execute("UPDATE jobs SET cancelling = 1 WHERE seq = ?", (row["seq"],))
                return "running"
            self._close(db, row["seq"], "cancelled")
            return "queued"

    def cancel_queued(self, *, kind: str | None = None, client: str | None = None) -> list[Stored]:
        """Cancel everything that waits, of one kind or client if given."""
        with self._store.transaction() as db:
            where, values = matching({"queued"}, kind, client)
            rows = db.execute(f"SELECT seq FROM jobs WHERE {where} ORDER BY seq", values).fetchall()
            for row in rows:
                self._close(db, row["seq"], "cancelled")
            return [row_of(db, row["seq"]) for row in rows]

    def expire(self) -> list[Stored]:
        """Fail what waited past its deadline, and return it."""
        now = self.clock()
        with self._store.transaction() as db:
            rows = db.execute(
                "SELECT seq, deadline, created FROM jobs WHERE state = 'queued' AND deadline <= ?", (now,)
            ).fetchall()
            for row in rows:
                message = (
                    f"Its deadline passed after {row['deadline'] - row['created']:.1f} s in the queue, before its turn "
                    f"came. Allow more time, or submit it when the queue is shorter."
                )
                self._close(db, row["seq"], "failed", error={"type": "DeadlineExceededError", "message": message})
            return [row_of(db, row["seq"]) for row in rows]

    def recover(self) -> list[Stored]:
        """Take care of what ran when an earlier process ended; call it once, before the first `claim`.

        Files of unfinished attempts are removed. What was being cancelled is cancelled; what has now seen its second
        death is set aside; all else waits at its old place again.

        Returns:
            Those requests, as they are now.
        """
        with self._store.transaction() as db:
            rows = db.execute(
                "SELECT * FROM jobs WHERE state = 'running' AND session != ? ORDER BY seq", (self._session,)
            ).fetchall()
            for row in rows:
                noted.remove(db, row["seq"])
                attempts = row["attempts"] + (row["session"] != "left")
                db.execute("UPDATE jobs SET attempts = ? WHERE seq = ?", (attempts, row["seq"]))
                if row["cancelling"]:
                    self._close(db, row["seq"], "cancelled")
                elif attempts >= DEATHS:
                    message = (
                        f"The server's process ended {attempts} times while this request ran, so it is not run again. "
                        f"If the server was killed for another reason, submit it anew; else look into its log."
                    )
                    self._close(db, row["seq"], "set_aside", error={"type": "SetAside", "message": message})
                else:
                    db.execute("UPDATE jobs SET state = 'queued', started = NULL WHERE seq = ?", (row["seq"],))
            return [row_of(db, row["seq"]) for row in rows]

    # ── seen from outside ────────────────────────────────────────────────────────────────────────────────────────

    def pending(self, kind: str | None = None, *, client: str | None = None) -> list[Stored]:
        """What waits, in the order in which its turn would come if nothing were added."""
        order = self._order()
        with self._store.reading() as db:
            where, values = matching({"queued"}, kind, client)
            rows = {row["seq"]: row for row in db.execute(f"SELECT * FROM jobs WHERE {where}", values)}
        return [Stored.of(rows[seq]) for seq in order if seq in rows]

    def position(self, id: str) -> int | None:
        """How many would have their turn before this one, as things stand; None where it does not wait."""
        stored = self.get(id)
        order = self._order() if stored is not None and stored.state == "queued" else []
        return order.index(stored.seq) if stored is not None and stored.seq in order else None

    def close(self) -> None:
        """Give the file up. Requests that are running now count as running when this process died: stop them first."""
        self._store.close()

    # ── within ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _order(self) -> list[int]:
        """The ages of all that wait, in the order of their turns."""
        levels: dict[int, dict[str, list[int]]] = {}  # priority → client → ages
        with self._turn:
            with self._store.reading() as db:
                for row in db.execute(
                    "SELECT seq, client, priority FROM jobs WHERE state = 'queued' ORDER BY priority DESC, number, seq"
                ):
                    levels.setdefault(row["priority"], {}).setdefault(row["client"], []).append(row["seq"])
            seconds = self._usual_seconds() or 1.0
            return [seq for waiting in levels.values() for seq in self._shares.order(waiting, seconds)]

    def _usual_seconds(self) -> float | None:
        """How long a request has taken of late; None where none has finished."""
        return sum(self._durations) / len(self._durations) if self._durations else None

    def _check_room(self, db: sqlite3.Connection, client: str) -> None:
        all_waiting, own = db.execute(
            "SELECT COUNT(*), COALESCE(SUM(client = ?), 0) FROM jobs WHERE state = 'queued'", (client,)
        ).fetchone()
        whose = None
        if all_waiting >= self.limit:
            whose = f"{all_waiting} requests wait, and no more than {self.limit} may"
        elif self.client_limit is not None and own >= self.client_limit:
            whose = f"{own} of your requests wait, and no more than {self.client_limit} of one client may"
        if whose is not None:
            running = db.execute("SELECT COUNT(*) FROM jobs WHERE state = 'running'").fetchone()[0]
            seconds = self._usual_seconds()
            # With so many running at once, one ends and makes room this often.
            wait = UNKNOWN_WAIT if seconds is None else math.ceil(seconds / max(1, running))
            wait = min(max(1, wait), LONGEST_WAIT)
            raise QueueFullError(f"The queue is full: {whose}. Try again in {wait} s.", retry_after=wait)

    def _end(
        self,
        id: str,
        state: State,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> Stored | None:
        with self._store.transaction() as db:
            row = running_row(db, id)
            if row is None:
                return None
            self._close(db, row["seq"], state, result=result, error=error)
            noted.keep(db, row["seq"])
            stored = row_of(db, row["seq"])
            if self.keep is not None:
                forget_oldest(db, self.keep)
        with self._turn:
            self._shares.ended(row["client"], stored.seconds or 0.0)
            if state == "done":
                self._durations.append(stored.seconds or 0.0)
        return stored

    def _close(
        self,
        db: sqlite3.Connection,
        seq: int,
        state: State,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> None:
        db.execute(
            "UPDATE jobs SET state = ?, finished = ?, result = ?, error = ?, cancelling = 0 WHERE seq = ?",
            (
                *(state, self.clock()),
                None if result is None else to_json(result, "The result"),
                None if error is None else to_json(error, "The error"),
                seq,
            ),
        )
