"""API keys: made here, shown once, and kept only as SHA-256.

A key is 256 bits of randomness, so that a plain hash keeps it: there is nothing to guess from. Keys given on the
command line are hashed at once, too, and are in memory only.
"""

import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from octavo.errors import RequestError, did_you_mean

LONGEST_NAME = 100  # letters
MARK = "octavo-"  # what our keys begin with, so that they are recognised where they should not be


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sends a request."""

    name: str  # of the key; jobs are shared out fairly between names
    priority: int = 0  # of this caller's jobs; the higher goes first


ANONYMOUS = Caller(name="anonymous")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One key, without the key."""

    name: str
    sha256: str
    priority: int = 0
    created: float = 0.0  # seconds since 1970


class Keys:
    """The keys that open a server: those of its file, read again when it changes, and those of the command line."""

    def __init__(self, file: Path, given: Sequence[str] = ()) -> None:
        self._file = file
        self._given = [
            Entry(name=f"api-key-{number}" if len(given) > 1 else "api-key", sha256=digest(key))
            for number, key in enumerate(given, 1)
        ]
        self._stamp: tuple[int, int] | None = None
        self._stored: list[Entry] = []
        self._read()

    def __bool__(self) -> bool:
        """Whether there is any key."""
        return bool(self._given or self._read())

    def caller(self, key: str) -> Caller | None:
        """Who has this key; takes equally long whichever it is."""
        wanted, found = digest(key), None
        for entry in (*self._given, *self._read()):
            if hmac.compare_digest(entry.sha256, wanted):
                found = entry
        return Caller(name=found.name, priority=found.priority) if found else None

    def _read(self) -> list[Entry]:
        try:
            status = self._file.stat()
        except FileNotFoundError:
            self._stamp, self._stored = None, []
            return self._stored
        stamp = status.st_mtime_ns, status.st_size
        if stamp != self._stamp:
            self._stored, self._stamp = read_keys(self._file), stamp
        return self._stored


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(file: Path) -> list[Entry]:
    """The keys of a file; none where there is no file.

    Raises:
        RequestError: it cannot be read. Nobody comes in by a file that is not understood.
    """
    try:
        entries = json.loads(file.read_text("utf-8"))
        return [Entry(**entry) for entry in entries]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"The keys in {file} cannot be read: {error}. Correct the file or take it away.") from error


def add_key(file: Path, name: str, *, priority: int = 0) -> str:
    """Make a key and keep its hash; returns the key, which is not kept anywhere.

    Raises:
        RequestError: the name is taken or empty.
    """
    entries = read_keys(file)
    if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
        raise RequestError(f"A key needs a name of at most {LONGEST_NAME} letters: who will use it?")
    if any(entry.name == name for entry in entries):
        raise RequestError(f"There is a key '{name}' already; 'octavo serve --remove-key {name}' takes it away.")
    key = MARK + secrets.token_urlsafe(32)
    _write(file, [*entries, Entry(name=name, sha256=digest(key), priority=priority, created=time.time())])
    return key


def remove_key(file: Path, name: str) -> None:
    """Take a key away; a running server refuses it from then on.

    Raises:
        RequestError: there is none of that name.
    """
    entries = read_keys(file)
    if all(entry.name != name for entry in entries):
        raise RequestError(f"There is no key '{name}'.{did_you_mean(name, [entry.name for entry in entries])}")
    _write(file, [entry for entry in entries if entry.name != name])


def _write(file: Path, entries: Sequence[Entry]) -> None:
    """Whole or not at all, and readable by the owner only."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
        json.dump([asdict(entry) for entry in entries], out, indent=1)
    os.replace(part, file)
