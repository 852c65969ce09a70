"""What there is to choose from in a workflow: the models of the shelf, the pictures in the input folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.checkpoint.folders import CATEGORIES

if TYPE_CHECKING:
    from octavo.pipeline.shelf import Shelf
    from octavo.server.state import State

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class ServerLists:
    """`graph.spec.Lists` of a server."""

    shelf: "Shelf"
    input_dir: Path
    output_dir: Path
    temp_dir: Path

    def names(self, category: str) -> list[str]:
        """Sorted names of the files in a category; nothing for categories that we have not."""
        if category == "input":
            return sorted(path.name for path in pictures(self.input_dir))
        return sorted(self.shelf.names(category)) if category in CATEGORIES else []


def lists_of(state: "State") -> ServerLists:
    """The lists of this server, as they are now."""
    settings = state.settings
    return ServerLists(state.shelf, settings.inputs, settings.output_dir, settings.temp_dir)


def pictures(folder: Path) -> Iterator[Path]:
    """The pictures directly in a folder, hidden ones left out."""
    return (
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.suffix.lower() in PICTURES and not path.name.startswith(".") and path.is_file()
    )
