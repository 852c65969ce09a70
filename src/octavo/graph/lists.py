"""What nodes' lists offer: the models of a shelf, and the pictures in the input folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from octavo.errors import RequestError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Names(Protocol):
    """Models by category; `pipeline.shelf.Shelf` is one."""

    def names(self, category: str) -> Sequence[str]:
        """Names of the files; RequestError where there is no such category."""
        ...


@dataclass(frozen=True, kw_only=True)
class FileLists:
    """The `graph.spec.Lists` of what is on disk now."""

    shelf: Names
    input_dir: Path
    output_dir: Path
    temp_dir: Path

    def names(self, category: str) -> Sequence[str]:
        """See `graph.spec.Lists.names`."""
        if category == "input":
            return pictures_in(self.input_dir)
        try:
            return self.shelf.names(category)
        except RequestError:
            return ()  # a kind of model that Octavo has no folder for


def pictures_in(folder: Path) -> list[str]:
    """Names of the pictures in a folder, without those of folders in it; none if there is no folder."""
    try:
        return sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICTURES and file.is_file())
    except OSError:
        return []
