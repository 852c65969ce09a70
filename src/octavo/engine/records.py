"""Looking things up in the queue's file, and throwing away what is over; `queue` has what changes a request's state."""

import sqlite3
from collections.abc import Collection, Iterable
from typing import Literal

from octavo.engine.jobs import OVER, State, Stored
from octavo.engine.store import Store

SortBy = Literal["created", "finished", "seconds"]

_COLUMNS: dict[SortBy, str] = {"created": "seq", "finished": "finished", "seconds": "finished - started"}


class Records:
    """The requests in an open store. Every method may be called from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, id: str) -> Stored | None:
        """One request; None where there is none of that id (any more)."""
        with self._store.reading() as db:
            row = db.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
            return None if row is None else Stored.of(row)

    def running(self, kind: str | None = None, *, client: str | None = None) -> list[Stored]:
        """What runs, in the order of the start."""
        with self._store.reading() as db:
            where, values = matching({"running"}, kind, client)
            rows = db.execute(f"SELECT * FROM jobs WHERE {where} ORDER BY started, seq", values).fetchall()
        return [Stored.of(row) for row in rows]

    def history(
        self,
        kind: str | None = None,
        limit: int | None = None,
        offset: int = 0,
        *,
        client: str | None = None,
        states: Collection[State] = OVER,
        newest_first: bool = True,
    ) -> list[Stored]:
        """What is over, a page at a time, in the order in which it ended."""
        return self.jobs(
            states,
            kind=kind,
            client=client,
            limit=limit,
            offset=offset,
            sort_by="finished",
            newest_first=newest_first,
        )

    def jobs(
        self,
        states: Collection[State] | None = None,
        *,
        kind: str | None = None,
        client: str | None = None,
        limit: int | None = None,
        offset: int = 0,
        sort_by: SortBy = "created",
        newest_first: bool = True,
    ) -> list[Stored]:
        """Requests in any states, a page at a time.

        Args:
            states: None means all.
            limit: how many at most; None means all.
            offset: how many to pass over first.
            sort_by: "seconds" is how long it ran; what did not run or has not ended counts as shortest.
        """
        with self._store.reading() as db:
            where, values = matching(states, kind, client)
            way = "DESC" if newest_first else "ASC"
            rows = db.execute(
                f"SELECT * FROM jobs WHERE {where} ORDER BY {_COLUMNS[sort_by]} {way}, seq {way} LIMIT ? OFFSET ?",
                (*values, -1 if limit is None else max(0, limit), max(0, offset)),
            ).fetchall()
        return [Stored.of(row) for row in rows]

    def counts(self, kind: str | None = None, *, client: str | None = None) -> dict[State, int]:
        """How many requests there are in each state; states without any are there with 0."""
        counts: dict[State, int] = {"queued": 0, "running": 0, **dict.fromkeys(OVER, 0)}
        with self._store.reading() as db:
            where, values = matching(None, kind, client)
            for row in db.execute(f"SELECT state, COUNT(*) AS n FROM jobs WHERE {where} GROUP BY state", values):
                counts[row["state"]] = row["n"]
        return counts

    def depth(self) -> dict[str, int]:
        """How many requests wait and run: {"queued": n, "running": n}; quick, however long the history."""
        with self._store.reading() as db:
            return {
                state: db.execute(f"SELECT COUNT(*) FROM jobs WHERE state = '{state}'").fetchone()[0]
                for state in ("queued", "running")
            }

    def cancelled(self, id: str) -> bool:
        """Whether a running request was asked to stop, or has been cancelled."""
        with self._store.reading() as db:
            row = db.execute("SELECT state, cancelling FROM jobs WHERE id = ?", (id,)).fetchone()
        return row is not None and bool(row["cancelling"] or row["state"] == "cancelled")

    def next_deadline(self) -> float | None:
        """When the first of the waiting requests expires, seconds since 1970."""
        with self._store.reading() as db:
            deadline = db.execute("SELECT MIN(deadline) FROM jobs WHERE state = 'queued'").fetchone()[0]
            return None if deadline is None else float(deadline)

    def delete(self, ids: Iterable[str]) -> int:
        """Take requests that are over out of the history; their output files stay. Returns how many there were."""
        with self._store.transaction() as db:
            return sum(
                db.execute("DELETE FROM jobs WHERE id = ? AND finished IS NOT NULL", (id,)).rowcount for id in ids
            )

    def clear(self, kind: str | None = None, *, client: str | None = None, states: Collection[State] = OVER) -> int:
        """Take all that is over out of the history, or all of one kind or client. Returns how many there were."""
        with self._store.transaction() as db:
            where, values = matching(states, kind, client)
            return db.execute(f"DELETE FROM jobs WHERE {where} AND finished IS NOT NULL", values).rowcount


def matching(states: Collection[State] | None, kind: str | None, client: str | None) -> tuple[str, list[str]]:
    """An SQL condition and its values; None leaves a question open."""
    conditions, values = ["TRUE"], []
    if states is not None and set(states) == set(OVER):
        conditions.append("finished IS NOT NULL")  # the same, and has an index in the order of the ends
    elif states is not None:
        # Written out, not bound: only so does SQLite see that an index for one state fits.
        known = [state for state in ("queued", "running", *OVER) if state in states]
        conditions.append(f"state IN ({', '.join(repr(state) for state in known)})")
    for column, given in (("kind", kind), ("client", client)):
        if given is not None:
            conditions.append(f"{column} = ?")
            values.append(given)
    return " AND ".join(conditions), values


def row_of(db: sqlite3.Connection, seq: int) -> Stored:
    """The request of that age, which is there."""
    return Stored.of(db.execute("SELECT * FROM jobs WHERE seq = ?", (seq,)).fetchone())


def running_row(db: sqlite3.Connection, id: str) -> sqlite3.Row | None:
    """What must be known of a request to end it; None where it does not run."""
    row: sqlite3.Row | None = db.execute(
        "SELECT seq, client, started, cancelling FROM jobs WHERE id = ? AND state = 'running'", (id,)
    ).fetchone()
    return row


def forget_oldest(db: sqlite3.Connection, keep: int) -> None:
    """Take out of the history what ended before the latest so many."""
    db.execute(
        "DELETE FROM jobs WHERE seq IN (SELECT seq FROM jobs WHERE finished IS NOT NULL"
        " ORDER BY finished DESC, seq DESC LIMIT -1 OFFSET ?)",
        (keep,),
    )
