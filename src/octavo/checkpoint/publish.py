"""New files into their place, all or nothing: one file, or a folder that is written beside its place and renamed."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo.checkpoint.folders import is_diffusers_folder
from octavo.checkpoint.header import PICKLE_SUFFIXES
from octavo.checkpoint.rewrite import Target, copy, layout_of
from octavo.checkpoint.save import Writer, cannot_write, check_space
from octavo.errors import RequestError

FILE_SUFFIXES = (".safetensors", ".sft")  # what a file is called; any other name is a folder's


@dataclass(frozen=True, slots=True)
class NewFile:
    """A safetensors file to be written."""

    path: Path  # within the folder; of a single file its name
    targets: tuple[Target, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)


def check_place(to: Path, sources: Iterable[Path], *, force: bool) -> None:
    """Whether `to` may be written.

    Raises:
        RequestError: something is there and `force` is not given, or it is nothing that may be replaced; it is, or
            holds, one of `sources`; its name is that of a format that is not written.
    """
    if to.suffix.lower() in {*PICKLE_SUFFIXES, ".gguf"}:
        raise RequestError(f"'{to}' has the name of a format that is not written. Use .safetensors, or a folder.")
    here = to.resolve()
    for source in sources:
        if here == source.resolve() or here in source.resolve().parents:
            raise RequestError(f"'{to}' is what would be read. Choose another place for the result.")
    if not to.exists():
        return
    if to.is_dir() != (not is_file_name(to)):
        raise RequestError(
            f"'{to}' is a {'folder' if to.is_dir() else 'file'} already. Give the result another name: "
            "one that ends on .safetensors for a file, any other for a folder."
        )
    if to.is_dir() and any(to.iterdir()) and not is_diffusers_folder(to):
        raise RequestError(
            f"'{to}' is a folder with other things than a diffusers model in it, which are not replaced. "
            "Name a folder that does not exist yet."
        )
    if not force and not (to.is_dir() and not any(to.iterdir())):
        raise RequestError(f"'{to}' is there already. Choose another place, or replace it with --force.")


def is_file_name(to: Path) -> bool:
    """Whether `to` is the name of a file rather than of a folder."""
    return to.suffix.lower() in FILE_SUFFIXES


def publish(to: Path, files: Sequence[NewFile], texts: Mapping[Path, bytes], progress: Callable[[int], object]) -> None:
    """Write `files` and `texts`; `to` is a file where there is one file, whose texts go beside it, else a folder.

    Args:
        to: checked by `check_place`; what is there is replaced.
        files: with paths within the folder.
        texts: other files, likewise.
        progress: told the bytes of every few megabytes written.

    Raises:
        CheckpointError: a weight is NaN, infinite or too large for its new dtype; a file cannot be read or written.
            What was at `to` is still there.
    """
    check_space(to, sum(file.nbytes for file in files) + sum(map(len, texts.values())))
    if is_file_name(to):
        (file,) = files
        _write(to, file, progress)
        for path, text in texts.items():
            to.with_name(path.name).write_bytes(text)
        return
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{to.name}.", suffix=".part", dir=to.parent))
    except OSError as error:
        raise cannot_write(to, error) from error
    try:
        for file in files:
            _write(beside / file.path, file, progress)
        for path, text in texts.items():
            (beside / path).parent.mkdir(parents=True, exist_ok=True)
            (beside / path).write_bytes(text)
        # mkdtemp makes folders private; a model is as open as any new folder.
        beside.chmod((beside / files[0].path.parts[0]).stat().st_mode)
        _exchange(beside, to)
    except OSError as error:
        raise cannot_write(to, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(path: Path, file: NewFile, progress: Callable[[int], object]) -> None:
    with Writer(path, layout_of(file.targets), file.metadata) as writer:
        copy(file.targets, writer, progress)


def _exchange(new: Path, to: Path) -> None:
    """Put the folder `new` at `to`; what was there goes only once the new one stands."""
    if not to.exists():
        os.replace(new, to)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{to.name}.", suffix=".old", dir=to.parent))
    os.replace(to, old / to.name)
    try:
        os.replace(new, to)
    except OSError:
        os.replace(old / to.name, to)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
