"""The folder of unfinished work beside a file in the making, by which a job goes on after an interruption."""

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from octavo.checkpoint.source import Source
from octavo.errors import CheckpointError, OctavoError, RequestError


def identity_of(source: Source) -> str:
    """Tells whether files are those that they were: paths, sizes and times of change, as a hash."""
    paths = sorted({header.path for file in source.files for header in file.headers})
    said = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


class Work:
    """Holds the folder while a job runs; use as a context manager.

    Args:
        folder: made if need be.
        identity: of the model that is quantized; what was left behind by work on another one is thrown away.
        keep: whether the folder stays when the job is done, or has failed for good.

    Attributes:
        resumed: whether work of an interrupted job was found.

    After an interruption (Ctrl-C, a kill, a full disk) the folder stays, so that the same command goes on from there.

    Raises:
        RequestError: another process works in it.
        CheckpointError: it cannot be written to.
    """

    def __init__(self, folder: Path, identity: str, *, keep: bool) -> None:
        self.folder, self.resumed = folder, False
        self._identity, self._keep = identity, keep
        self._lock = FileLock(folder.with_name(f"{folder.name}.lock"))

    def __enter__(self) -> Self:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            job = self.folder / "job.json"
            if self.folder.is_dir():
                self.resumed = job.is_file() and job.read_text("utf-8") == self._identity
                if not self.resumed:
                    self._refuse_foreign(job)
                    shutil.rmtree(self.folder)
            self.folder.mkdir(exist_ok=True)
            job.write_text(self._identity, "utf-8")
        except Timeout as taken:
            raise RequestError(
                f"Another process works in '{self.folder}'. Wait for it, stop it, or choose another place."
            ) from taken
        except OSError as error:
            self._unlock()
            raise CheckpointError(f"'{self.folder}' cannot be used: {error.strerror or error}.") from error
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A part that a writer left is one that can be gone on with: it takes away those that cannot.
        hopeless = isinstance(error, OctavoError) and not any(self.folder.glob("*.part"))
        if (kind is None or hopeless) and not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def _refuse_foreign(self, job: Path) -> None:
        """Throw away only what is known to be ours."""
        if not job.is_file() and any(self.folder.iterdir()):
            raise RequestError(f"The folder '{self.folder}' holds other things. Give --work another folder.")

    def _unlock(self) -> None:
        if self._lock.is_locked:
            with suppress(OSError):  # Windows deletes no open file; an empty one does no harm
                Path(self._lock.lock_file).unlink()
            self._lock.release()
