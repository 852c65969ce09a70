"""A safetensors file that is hours in the making, and goes on after it was interrupted.

Beside the place of the file lie, until it is complete, the file itself as `<name>.part` and a journal of the tensors
in it, `<name>.part.journal`. A tensor enters the journal when its bytes are safe on disk, so what the journal names
need not be made again, whatever ended the work: Ctrl-C, a kill, a power cut. The bytes are those of a file written in
one go.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

from octavo.checkpoint.save import Layout, Writer, check_space
from octavo.errors import OctavoError, RequestError

COMMIT_BYTES = 64 << 20  # written between two entries of the journal


class ResumableWriter(Writer):
    """A `Writer` whose work survives; use as a context manager.

    Args:
        path, layout, metadata: as for `Writer`. Layout and metadata together tell one job from another: put whatever
            decides about the tensors' values into the metadata.

    Attributes:
        done: names that were written before the interruption; they must not be written again.
        restarted: whether the part of another job was there, and was thrown away.

    An `OctavoError` inside the context means that the job cannot succeed: nothing is left behind. After any other
    exception, and where the disk is at fault, the part stays.

    Raises:
        RequestError: another process is writing this file.
        CheckpointError: the disk has no room for what is missing, or the folder cannot be written to.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        from filelock import FileLock

        self.done: frozenset[str] = frozenset()
        self.restarted = False
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._disk_failed = False
        self._lock = FileLock(path.with_name(f"{path.name}.part.lock"))
        try:
            super().__init__(path, layout, metadata)
        except BaseException:
            self._unlock()
            raise
        self._missing -= self.done

    def commit(self) -> None:
        """Bring what is written to disk, and into the journal."""
        if not self._pending:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._note({"written": self._pending})
        except OSError as error:
            self._failed(error)
        self._pending, self._pending_bytes = [], 0

    def _open(self) -> tuple[Path, BinaryIO]:
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=0)
        except Timeout as taken:
            raise RequestError(
                f"Another process is writing '{self.path}'. Wait for it, stop it, or choose another place."
            ) from taken
        part = self.path.with_name(f"{self.path.name}.part")
        self._journal_path = self.path.with_name(f"{self.path.name}.part.journal")
        identity = hashlib.sha256(self._header).hexdigest()
        done, length = self._read_journal(identity, part) if part.is_file() else (None, 0)
        self.restarted = part.is_file() and done is None
        if done is not None:
            check_space(self.path, max(0, self.nbytes - _bytes_on_disk(part)))
            self.done = frozenset(done)
            self._journal: BinaryIO = self._journal_path.open("r+b")
            self._journal.truncate(length)  # of a line that was cut off
            self._journal.seek(length)
            return part, part.open("r+b")
        # The old journal goes first: it must never vouch for the new file.
        self._journal_path.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
        check_space(self.path, self.nbytes)
        file = part.open("wb")
        file.write(self._header)
        file.flush()
        os.fsync(file.fileno())
        self._journal = self._journal_path.open("wb")
        self._note({"job": identity})
        return part, file

    def _read_journal(self, identity: str, part: Path) -> tuple[list[str] | None, int]:
        """The names that are on disk (None: of another job), and the length of the journal's whole lines in bytes."""
        try:
            text = self._journal_path.read_bytes()
        except FileNotFoundError:
            return None, 0
        whole = text[: text.rfind(b"\n") + 1]
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()]
            names = [name for line in lines for name in line["written"]]
            if first != {"job": identity} or not set(names) <= set(self.layout):
                return None, 0
        except (ValueError, KeyError, TypeError):
            return None, 0
        with part.open("rb") as file:
            intact = file.read(len(self._header)) == self._header
        return (names, len(whole)) if intact else (None, 0)

    def _note(self, fields: Mapping[str, object]) -> None:
        self._journal.write(json.dumps(fields).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _written(self, name: str, nbytes: int) -> None:
        self._pending.append(name)
        self._pending_bytes += nbytes
        if self._pending_bytes >= COMMIT_BYTES:
            self.commit()

    def _failed(self, error: OSError) -> NoReturn:
        self._disk_failed = True
        super()._failed(error)

    def _clean(self, error: BaseException | None) -> None:
        hopeless = isinstance(error, OctavoError) and not self._disk_failed
        finished = not self._part.exists()
        if not finished and not hopeless and not self._file.closed:
            with suppress(OctavoError):
                self.commit()
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._journal.close()
        if finished or hopeless:
            self._part.unlink(missing_ok=True)
            self._journal_path.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock.is_locked:
            with suppress(OSError):  # Windows deletes no open file; an empty one does no harm
                Path(self._lock.lock_file).unlink()
            self._lock.release()


def _bytes_on_disk(path: Path) -> int:
    """What the file takes of the disk; of one that was not written in order that is less than its length."""
    status = path.stat()
    return int(status.st_blocks) * 512 if hasattr(status, "st_blocks") else status.st_size
