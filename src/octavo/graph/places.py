"""Files that a workflow names: which folder they are in, and never one outside of it."""

from pathlib import Path
from typing import Protocol

from octavo.errors import RequestError


class Folders(Protocol):
    """The three folders that a workflow may name files in."""

    @property
    def input_dir(self) -> Path: ...
    @property
    def output_dir(self) -> Path: ...
    @property
    def temp_dir(self) -> Path: ...


def annotated_path(name: str, folders: Folders) -> Path:
    """The file that `name` means: `a.png` and `sub/a.png` are in the input folder, `a.png [output]` in the output one.

    Raises:
        RequestError: the name leads out of its folder, by `..`, a drive, an absolute path or a symbolic link. The
            file need not exist.
    """
    folder, bare = folders.input_dir, name
    for kind in ("input", "output", "temp"):
        if name.endswith(f"[{kind}]"):
            folder, bare = getattr(folders, f"{kind}_dir"), name[: -len(kind) - 2].rstrip()
    return inside(folder, bare)


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, which must lie in `folder` once symbolic links are followed.

    Raises:
        RequestError: it does not.
    """
    try:
        root = folder.resolve()
        path = (root / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a loop of links, a name too long
        raise RequestError(f"'{name[:200]}' is no name of a file.") from error
    if "\\" in name or not path.is_relative_to(root) or path == root:
        raise RequestError(f"'{name[:200]}' leads out of the folder {folder.name}; name a file inside of it.")
    return path
