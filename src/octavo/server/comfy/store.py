"""What ComfyUI's page keeps for its user: settings, and files such as workflows, in a folder that nothing leads out of.

ComfyUI keeps them in `user/default`, the settings in `comfy.settings.json` among the files; so do we, so that a folder
can be moved over.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from octavo.errors import RequestError
from octavo.server.problems import Refused
from octavo.server.security import jail

SETTINGS = "comfy.settings.json"
LARGEST_SETTINGS = 4 * 2**20  # bytes, so that what is sent bit by bit cannot fill the disk


class UserFiles:
    """One user's folder; safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = RLock()

    # Settings

    def settings(self) -> dict[str, Any]:
        """All settings by name.

        Raises:
            Refused: the file was damaged by another program.
        """
        try:
            value = json.loads((self.folder / SETTINGS).read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise _damaged(str(error)) from None
        if not isinstance(value, dict):
            raise _damaged("it holds no object")
        return value

    def change_settings(self, changes: Mapping[str, Any]) -> None:
        """Lay `changes` over the settings.

        Raises:
            Refused: there would be too much of them, or they cannot be written.
        """
        with self._lock:
            text = json.dumps(self.settings() | dict(changes), indent=4).encode()
            if len(text) > LARGEST_SETTINGS:
                raise Refused(f"More than {LARGEST_SETTINGS >> 20} MB of settings are not kept.", status=413)
            with _said_plainly(SETTINGS):
                write_whole(self.folder / SETTINGS, text)

    # Files

    def path(self, name: str) -> Path:
        """Where the file called `name` is or would be.

        Raises:
            Refused: 403; the name leads out of the folder.
        """
        try:
            return jail(self.folder, name)
        except RequestError as error:
            raise Refused(str(error), status=403, kind="forbidden") from None

    def write(self, name: str, content: bytes, *, overwrite: bool) -> Path:
        """Write a file, whole or not at all.

        Raises:
            Refused: 409 where there is one and `overwrite` is False; 400 where it cannot be written.
        """
        path = self.path(name)
        with self._lock, _said_plainly(name):
            if not overwrite and path.exists():
                raise _exists()
            write_whole(path, content)
        return path

    def move(self, name: str, to: str, *, overwrite: bool) -> Path:
        """Give a file another name.

        Raises:
            Refused: 404 where there is none, 409 where the new name is taken and `overwrite` is False.
        """
        path, target = self.path(name), self.path(to)
        with self._lock, _said_plainly(to):
            if not path.exists():
                raise Refused(f"There is no file '{name}'.", status=404, kind="not_found")
            if not overwrite and target.exists():
                raise _exists()
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        return target

    def delete(self, name: str) -> None:
        """Take a file away.

        Raises:
            Refused: 404 where there is none.
        """
        path = self.path(name)
        with self._lock, _said_plainly(name):
            if not path.is_file():
                raise Refused(f"There is no file '{name}'.", status=404, kind="not_found")
            path.unlink()

    def name_of(self, path: Path) -> str:
        """A path as its user calls it, with slashes."""
        return path.relative_to(self.folder.resolve()).as_posix()


def files_below(folder: Path, *, recurse: bool) -> Iterator[Path]:
    """Files in a folder by name; hidden ones and links that lead out of it are left out."""
    root = folder.resolve()
    for path in sorted(root.rglob("*") if recurse else root.glob("*")):
        parts = path.relative_to(root).parts
        if not any(part.startswith(".") for part in parts) and path.is_file() and path.resolve().is_relative_to(root):
            yield path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part; folders are made.

    Raises:
        OSError: the disk says no.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(part, path)
    except OSError:
        Path(part).unlink(missing_ok=True)
        raise


@contextmanager
def _said_plainly(name: str) -> Iterator[None]:
    """What the disk refuses (a folder of that name, a name too long, no room) in words."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or "it cannot be written"
        raise Refused(f"'{name[:200]}' cannot be kept: {reason}. Choose another name.") from error


def _exists() -> Refused:
    return Refused("File already exists", status=409, kind="exists")


def _damaged(reason: str) -> Refused:
    return Refused(
        f"The settings in {SETTINGS} cannot be read: {reason}. Correct the file or take it away.", status=409
    )
