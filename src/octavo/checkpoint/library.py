"""What the files of a models tree are, told from their headers; no torch, and no bad file hides the others."""

from dataclasses import dataclass

from octavo.checkpoint.folders import COMPONENTS, Folders, ModelFile, weights_in
from octavo.checkpoint.header import read_headers
from octavo.checkpoint.kinds import Kind, find_parts
from octavo.errors import OctavoError


@dataclass(frozen=True, slots=True)
class Item:
    """A file of the tree and what it holds."""

    file: ModelFile
    nbytes: int
    kinds: tuple[Kind, ...]  # none where nothing known is inside
    problem: str | None  # why it cannot be used


def survey(folders: Folders, *categories: str) -> list[Item]:
    """Every file of these categories (all, if none is given)."""
    return [examine(file) for file in folders.files(*categories)]


def examine(file: ModelFile) -> Item:
    """One file, or all components of a diffusers folder."""
    path = file.path
    weights = [found for name in COMPONENTS if (found := weights_in(path / name))] if path.is_dir() else [path]
    nbytes = 0
    kinds: dict[Kind, None] = {}
    for each in weights:
        try:
            headers = read_headers(each)
            nbytes += sum(header.path.stat().st_size for header in headers)
            entries = {name: entry for header in headers for name, entry in header.entries.items()}
            kinds |= dict.fromkeys(part.kind for part in find_parts(each, entries, headers[0].metadata))
        except OctavoError as error:
            return Item(file, nbytes or each.stat().st_size, tuple(kinds), str(error))
    return Item(file, nbytes, tuple(kinds), None)
