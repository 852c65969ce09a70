"""Output files of requests that have not finished: their names are written down before they appear.

All functions work within a transaction of the queue; `seq` is a request's age, which names it in the tables.
"""

import logging
import os
import sqlite3
from pathlib import Path

logger = logging.getLogger(__name__)


def note(db: sqlite3.Connection, seq: int, path: Path) -> None:
    """Write down that this request is about to make this file.

    Raises:
        FileExistsError: the file exists, or another request that has not finished has noted it.
    """
    path = Path(path).absolute()
    holder = db.execute("SELECT job FROM files WHERE path = ?", (os.fsencode(path),)).fetchone()
    if holder is not None and holder["job"] == seq:
        return
    if holder is not None or os.path.lexists(path):
        raise FileExistsError(f"{path} is taken already.")
    db.execute("INSERT INTO files VALUES (?, ?)", (os.fsencode(path), seq))


def keep(db: sqlite3.Connection, seq: int) -> None:
    """From now on the request's files are results like any others."""
    db.execute("DELETE FROM files WHERE job = ?", (seq,))


def remove(db: sqlite3.Connection, seq: int) -> None:
    """Remove what an attempt that did not finish has made; a file that cannot be removed is only logged."""
    for row in db.execute("SELECT path FROM files WHERE job = ?", (seq,)).fetchall():
        path = os.fsdecode(row["path"])
        try:
            os.unlink(path)
            logger.info("Removed %s, left by a request that did not finish", path)
        except FileNotFoundError:
            pass  # noted, but not made
        except OSError as error:
            logger.warning("Could not remove %s, left by a request that did not finish: %s", path, error)
    keep(db, seq)
