"""Tensors of one file into another, streamed: as bytes where the dtype stays, through a small buffer where it changes.

    targets = translate(plan, …)                          # what the new file shall hold, and from where
    with Writer(path, layout_of(targets), metadata) as writer:
        copy(targets, writer)

Peak memory is a few megabytes, whatever the size of the tensors.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.checkpoint.save import Layout, Writer
from octavo.checkpoint.tensors import TensorFile, all_finite, torch_dtype
from octavo.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows start to stop of a tensor in a file; all of it where there are none to count."""

    file: TensorFile
    name: str
    start: int
    stop: int

    def chunks(self) -> Iterator[Tensor]:
        entry = self.file.entries[self.name]
        whole = not entry.shape or (self.start, self.stop) == (0, entry.shape[0])
        return self.file.chunks(self.name, rows=None if whole else (self.start, self.stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One tensor of the new file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: tuple[Rows, ...] = ()  # what it is made of, one upon the other
    make: Callable[[], Tensor] | None = None  # gives it instead, for small ones such as scales

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def made(name: str, tensor: Tensor) -> Target:
    """A target that is at hand."""
    return Target(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), make=lambda: tensor)


def as_it_is(file: TensorFile, name: str) -> Target:
    """The tensor `name` of `file`, byte for byte."""
    entry = file.entries[name]
    rows = Rows(file, name, 0, entry.shape[0] if entry.shape else 1)
    return Target(name=name, dtype=torch_dtype(entry), shape=entry.shape, rows=(rows,))


def layout_of(targets: Iterable[Target]) -> Layout:
    """What `Writer` wants to know of them."""
    return {target.name: (target.dtype, target.shape) for target in targets}


def copy(targets: Iterable[Target], writer: Writer, progress: Callable[[int], object] = lambda _: None) -> None:
    """Write `targets`.

    Args:
        targets: in the order in which they lie in their files, if reading shall be fast.
        writer: whose layout holds them.
        progress: told the bytes of every few megabytes written.

    Raises:
        CheckpointError: a weight is NaN, infinite, or too large for the dtype asked for; a file cannot be read, or the
            disk is full.
    """
    for target in targets:
        if target.make is not None:
            writer.write(target.name, target.make())
            progress(target.nbytes)
        else:
            writer.write_chunks(target.name, _chunks(target, progress))


def _chunks(target: Target, progress: Callable[[int], object]) -> Iterator[Tensor]:
    for rows in target.rows:
        for chunk in rows.chunks():
            cast = chunk.to(target.dtype)
            if cast.dtype != chunk.dtype and not all_finite(cast):
                raise CheckpointError(
                    f"'{rows.file.path}' has values in '{rows.name}' beyond the {torch.finfo(target.dtype).max:g} of "
                    f"{str(target.dtype).removeprefix('torch.')}. Choose bfloat16 or float32."
                )
            yield cast
            progress(cast.nbytes)
