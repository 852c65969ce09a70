"""Tensors into safetensors files, all or nothing.

A file appears under its name only when it is complete and on disk: it is written beside its place and renamed.
`Writer` takes tensors one at a time, so that a model larger than memory can be written; `save_safetensors` is the same
for tensors already at hand.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

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
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.layout = layout
        self._missing = set(layout)
        header, self._starts, total = _plan(layout, metadata or {})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
            if free < total:
                raise CheckpointError(
                    f"'{path}' needs {total / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB left."
                )
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
            self._part = Path(name)
            self._file = os.fdopen(handle, "wb")
            self._file.write(header)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, name: str, tensor: Tensor) -> None:
        """Put `tensor` in its place; each name of the layout is written once, in any order."""
        assert name in self._missing, f"'{name}' is not in the layout, or was written before"
        assert (tensor.dtype, tuple(tensor.shape)) == self.layout[name], f"'{name}' differs from the layout"
        try:
            self._file.seek(self._starts[name])
            self._file.write(bytes_of(tensor.detach().contiguous().cpu()))
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._missing.remove(name)

    def __enter__(self) -> "Writer":
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
            raise _cannot_write(self.path, failure) from failure
        finally:
            self._file.close()
            self._part.unlink(missing_ok=True)


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


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"'{path}' cannot be written: {error.strerror or error}. Choose another place or make room.")
