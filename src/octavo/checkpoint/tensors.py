"""Tensors out of safetensors files, straight into their final dtype and place.

What is read goes through one small buffer, or through none where file and destination agree, so reading a model costs
the model and a few megabytes. One tensor is read at once by `read_into`, many at a time by `deliver`; FP8 codes for a
CPU need not be read at all: `mapped` lets them stay in the page cache. Headers are checked in `header`; what the names
mean is for `layout` and `detect`.
"""

import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import torch
from torch import Tensor

from octavo.checkpoint.delivery import HOST_CHUNK, Delivery, HostLane, Piece
from octavo.checkpoint.header import Entry, Header, read_headers
from octavo.errors import CheckpointError, CorruptFileError, UnsupportedFormatError
from octavo.fp8.formats import FORMATS, all_finite_codes

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
DEVICE_CHUNK = 32 << 20  # bytes sent at a time to an accelerator that is not CUDA's
WORTH_MAPPING = 1 << 20  # bytes; less is read, for a mapping costs pages of its own


class TensorFile:
    """The tensors of one safetensors file, or of several shards read as one; use as a context manager.

    Attributes:
        path: what was opened: the file, or the shards' index.
        headers: one per file.
        entries: all tensors by name.
    """

    def __init__(self, path: Path, headers: tuple[Header, ...]) -> None:
        self.path = path
        self.headers = headers
        self.entries: dict[str, Entry] = {name: entry for header in headers for name, entry in header.entries.items()}
        self._files: dict[Path, BinaryIO] = {}
        self._buffers: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._lane = HostLane()

    @property
    def metadata(self) -> dict[str, str]:
        """What the headers say beside the tensors; a later shard wins."""
        return {key: value for header in self.headers for key, value in header.metadata.items()}

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """The tensor `name`, in its own dtype unless `dtype` is given. Values are taken as they are, NaN included."""
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=dtype or torch_dtype(entry), device=device)
        self.read_into(name, out, check=False)
        return out

    def read_into(self, name: str, out: Tensor, *, rows: tuple[int, int] | None = None, check: bool = True) -> None:
        """Fill `out` with the tensor `name`, converting dtype and device on the way.

        Args:
            out: contiguous, with as many elements as are read; the shape may differ (a linear and a 1×1 conv).
            rows: read only these, from and up to, of the first dimension.
            check: refuse NaN and infinity.

        Raises:
            CorruptFileError: the file ends early, or holds NaN or infinity.
            UnsupportedFormatError: a number format that torch cannot hold.
        """
        for piece in self._pieces(name, out, rows, check, HOST_CHUNK if out.device.type == "cpu" else DEVICE_CHUNK):
            if out.device.type == "cpu":
                self._lane.carry(piece)
                continue
            staged = self._buffer(out.device)[: piece.nbytes].view(piece.dtype)
            self.fill(piece.entry, piece.start, staged)
            piece.place.copy_(staged)
            if check:
                check_finite(piece.entry, staged, piece.place)

    def deliver(
        self, delivery: Delivery, name: str, out: Tensor, *, rows: tuple[int, int] | None = None, check: bool = True
    ) -> None:
        """`read_into`, but as `delivery` gets round to it; errors are raised by its `wait` and `finish`."""
        delivery.give(list(self._pieces(name, out, rows, check, delivery.chunk, ready=delivery.mark())))

    def mapped(self, name: str, *, check: bool = True) -> Tensor | None:
        """The FP8 tensor `name` where it lies in the page cache, nothing being copied; None where that is of no use.

        Its memory is the file's own: several processes share it, and the system may drop and read it again. What is
        written to it stays private. The file must stay as it is while the tensor lives: one that is cut ends the
        process. Replacing it by another one, as Octavo's own commands do, is safe. OCTAVO_MAP=0 in the environment has
        everything read instead.

        Only FP8 codes are mapped: they are decoded byte by byte, so that it does not matter where in memory they begin.

        Raises:
            CorruptFileError: the file ends early, or holds NaN or infinity.
        """
        entry = self.entries[name]
        dtype = torch_dtype(entry)
        if dtype not in FORMATS or entry.nbytes < WORTH_MAPPING or os.environ.get("OCTAVO_MAP") == "0":
            return None
        with _reading(entry.file):
            number = self._open(entry.file).fileno()
            if os.fstat(number).st_size < entry.start + entry.nbytes:
                _refuse_end(entry)
            offset = entry.start % mmap.ALLOCATIONGRANULARITY
            memory = mmap.mmap(number, entry.nbytes + offset, access=mmap.ACCESS_COPY, offset=entry.start - offset)
        codes = torch.frombuffer(memory, dtype=torch.uint8, count=entry.nbytes, offset=offset).view(dtype)
        if check:
            for start in range(0, entry.nbytes, HOST_CHUNK):
                chunk = codes[start : start + HOST_CHUNK]
                check_finite(entry, chunk, chunk)
        return codes.view(entry.shape)

    def chunks(self, name: str, *, rows: tuple[int, int] | None = None, check: bool = True) -> Iterator[Tensor]:
        """The tensor `name`, or some rows of it, in pieces of a few megabytes, each flat and in its own dtype.

        A piece is good until the next one is asked for. Arguments and errors as of `read_into`.
        """
        entry = self.entries[name]
        dtype = torch_dtype(entry)
        start, nbytes = entry.start, entry.nbytes
        if rows is not None:
            row_bytes = nbytes // entry.shape[0]
            start, nbytes = start + rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes
        buffer = torch.empty(min(HOST_CHUNK, nbytes), dtype=torch.uint8)
        for position in range(0, nbytes, HOST_CHUNK):
            chunk = buffer[: min(HOST_CHUNK, nbytes - position)].view(dtype)
            self.fill(entry, start + position, chunk)
            if check:
                check_finite(entry, chunk, chunk)
            yield chunk

    def close(self) -> None:
        """Close the files; reading opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._buffers.clear()
        self._lane = HostLane()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def fill(self, entry: Entry, start: int, chunk: Tensor) -> None:
        """Read what follows byte `start` of the file into `chunk`, host memory; from any thread.

        Raises:
            CorruptFileError: the file ends early.
            CheckpointError: it cannot be read.
        """
        view, done = bytes_of(chunk), 0
        with _reading(entry.file):
            file = self._open(entry.file)
            while done < len(view):
                count = self._read(file, view[done:], start + done)
                if not count:
                    _refuse_end(entry)
                done += count

    def _read(self, file: BinaryIO, view: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [view], start)
        with self._lock:  # systems without it (Windows) have one position a file
            file.seek(start)
            return int(file.readinto(view))  # type: ignore[attr-defined]  # unbuffered files have it

    def _open(self, path: Path) -> BinaryIO:
        with self._lock:
            if path not in self._files:
                self._files[path] = path.open("rb", buffering=0)
            return self._files[path]

    def _buffer(self, device: torch.device) -> Tensor:
        if device.type not in self._buffers:
            self._buffers[device.type] = torch.empty(DEVICE_CHUNK, dtype=torch.uint8, pin_memory=device.type == "cuda")
        return self._buffers[device.type]

    def _pieces(
        self,
        name: str,
        out: Tensor,
        rows: tuple[int, int] | None,
        check: bool,
        chunk_bytes: int,
        ready: object = None,
    ) -> Iterator[Piece]:
        """The tensor, or some rows of it, in pieces of up to `chunk_bytes`, each with its part of `out`."""
        entry = self.entries[name]
        dtype = torch_dtype(entry)
        start, nbytes = entry.start, entry.nbytes
        if rows is not None:
            row_bytes = nbytes // entry.shape[0]
            start, nbytes = start + rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes
        assert out.is_contiguous(), f"'{name}' goes into a tensor that is not contiguous"
        assert out.numel() * dtype.itemsize == nbytes, f"'{name}' has {nbytes} bytes, its place {out.numel()} elements"
        flat = out.view(-1)
        for position in range(0, nbytes, chunk_bytes):
            size = min(chunk_bytes, nbytes - position)
            place = flat[position // dtype.itemsize : (position + size) // dtype.itemsize]
            yield Piece(self, entry, start + position, dtype, place, check, ready)


def open_tensors(path: Path) -> TensorFile:
    """The tensors at `path`: a .safetensors file, or an index of shards (`*.safetensors.index.json`).

    Raises:
        ModelNotFoundError: the file is not there.
        CheckpointError: it, or one of its shards, is damaged, missing or of a format that is not read.
    """
    return TensorFile(path, read_headers(path))


def torch_dtype(entry: Entry) -> torch.dtype:
    """How torch calls the dtype of `entry`; UnsupportedFormatError where torch has no such numbers."""
    if entry.dtype not in DTYPES:
        raise UnsupportedFormatError(
            f"'{entry.file}' keeps '{entry.name}' as {entry.dtype}, which Octavo does not read. "
            "Use a 16-bit or FP8 version of the model."
        )
    return DTYPES[entry.dtype]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return tensor.view(-1).view(torch.uint8).numpy().data


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}.") from error


def _refuse_end(entry: Entry) -> NoReturn:
    raise CorruptFileError(
        f"'{entry.file}' ended while '{entry.name}' was read; it was longer a moment ago. "
        "Is it still being downloaded? Wait, or download it again."
    )


def check_finite(entry: Entry, chunk: Tensor, place: Tensor) -> None:
    """Refuse NaN and infinity: `chunk` is as read, `place` as stored: a conversion to float16 can overflow."""
    if not all_finite(chunk):
        refuse_not_finite(entry)
    if place.dtype == torch.float16 and chunk.dtype != torch.float16 and not all_finite(place):
        refuse_overflow(entry)


def refuse_not_finite(entry: Entry) -> NoReturn:
    """Raise the CorruptFileError about NaN or infinity in a tensor."""
    raise CorruptFileError(
        f"'{entry.file}' has NaN or infinity in '{entry.name}', so no picture can come of it. "
        "Download or make the file again."
    )


def refuse_overflow(entry: Entry) -> NoReturn:
    """Raise the CheckpointError about values that float16 cannot hold."""
    raise CheckpointError(
        f"'{entry.file}' has values in '{entry.name}' beyond float16's 65504. Load it as bfloat16 or float32."
    )


def all_finite(tensor: Tensor) -> bool:
    """Whether `tensor` holds neither NaN nor infinity; integers never do.

    One pass over the memory: minimum and maximum carry NaN along, and FP8 codes are compared as integers.
    """
    if tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        return True
    if tensor.dtype in FORMATS:
        return all_finite_codes(tensor)
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))
