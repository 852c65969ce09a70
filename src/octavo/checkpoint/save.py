"""Tensors into safetensors files, all or nothing.

A file appears under its name only when it is complete and on disk: it is written beside its place and renamed.
`Writer` takes tensors one at a time, so that a model larger than memory can be written; `save_safetensors` is the same
for tensors already at hand. Work of hours is written by `resume`, which goes on after an interruption.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NoReturn, Self

import torch
from torch import Tensor

from octavo.checkpoint.header import LENGTH_BYTES
from octavo.checkpoint.tensors import DTYPES, bytes_of
from octavo.errors import CheckpointError

NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` (any device) to `path`, replacing a file that is there; `metadata` goes into the header.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written to; nothing is left behind.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with Writer(path, layout, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


class Writer:
    """One safetensors file in the making; use as a context manager.

    Args:
        path: where the file shall appear; its folder is made if need be.
        layout: dtype and shape of every tensor that will be written.
        metadata: strings for the header.

    Leaving the context puts the file in its place; an exception leaves what was at `path` as it was.

    Raises:
        CheckpointError: the disk has no room for it, or the folder cannot be written to.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.layout = layout
        self._missing = set(layout)
        self._header, self._starts, self.nbytes = _plan(layout, metadata or {})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._part, self._file = self._open()
        except OSError as error:
            raise cannot_write(path, error) from error

    def write(self, name: str, tensor: Tensor) -> None:
        """Put `tensor` in its place; each name of the layout is written once, in any order."""
        assert name in self.layout, f"'{name}' is not in the layout"
        assert (tensor.dtype, tuple(tensor.shape)) == self.layout[name], f"'{name}' differs from the layout"
        self.write_chunks(name, (tensor,))

    def write_chunks(self, name: str, chunks: Iterable[Tensor]) -> None:
        """Put a tensor in its place that comes in chunks: of its dtype and any shape, in the order of its elements."""
        assert name in self._missing, f"'{name}' is not in the layout, or was written before"
        dtype, shape = self.layout[name]
        written = 0
        for chunk in chunks:
            assert chunk.dtype == dtype, f"'{name}' differs from the layout"
            data = bytes_of(chunk.detach().contiguous().cpu())
            try:
                self._file.seek(self._starts[name] + written)
                self._file.write(data)
            except OSError as error:
                self._failed(error)
            written += len(data)
        assert written == math.prod(shape) * dtype.itemsize, f"'{name}' came with {written} bytes"
        self._missing.remove(name)
        self._written(name, written)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not self._missing, f"never written: {sorted(self._missing)[:3]}"
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                # mkstemp makes files private; a model is as readable as any new file.
                os.chmod(self._part, 0o666 & ~_umask())
                os.replace(self._part, self.path)
        except OSError as failure:
            self._failed(failure)
        finally:
            self._clean(error)

    def _open(self) -> tuple[Path, BinaryIO]:
        """The file beside the place, its header written."""
        check_space(self.path, self.nbytes)
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=".part", dir=self.path.parent)
        file = os.fdopen(handle, "wb")
        file.write(self._header)
        return Path(name), file

    def _written(self, name: str, nbytes: int) -> None:
        """Called when a tensor is written."""

    def _failed(self, error: OSError) -> NoReturn:
        raise cannot_write(self.path, error) from error

    def _clean(self, error: BaseException | None) -> None:  # noqa: ARG002
        """Leave nothing but the finished file; `error` is what ended the work, if anything did."""
        with suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)


def check_space(path: Path, nbytes: int) -> None:
    """Raise a CheckpointError where the disk that `path` is to be on has no room for so many bytes more."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(
            f"'{path}' needs {nbytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB left. "
            "Make room, or choose a place on another disk."
        )


def _plan(layout: Layout, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, each tensor's place in the file, and the file's size."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    position = 0
    # Widest dtypes first keep every tensor aligned to its elements.
    for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
        dtype, shape = layout[name]
        nbytes = math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (position, position + nbytes)}
        offsets[name] = position
        position += nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + position


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"'{path}' cannot be written: {error.strerror or error}. Choose another place or make room.")
