"""Bytes of files on their way into tensors: read by several threads at once, each straight into its place.

    with Delivery(device) as delivery:
        file.deliver(delivery, name, out)     # returns at once
        ...
        delivery.finish()                     # everything has arrived and is checked

On a CPU a thread reads into the tensor itself, or through a small buffer where the dtype changes. For a GPU each thread
has two pinned buffers and a stream of its own: while one buffer flies to the device the other is filled, and NaN is
looked for on the device, of which one answer is fetched in the end. What CUDA does for this is `Courier`, so that the
order of things can be tested without a GPU.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Protocol, Self

import torch
from torch import Tensor

from octavo.devices import compute_on_one_core
from octavo.fp8.formats import FORMATS

if TYPE_CHECKING:
    from octavo.checkpoint.header import Entry
    from octavo.checkpoint.tensors import TensorFile

HOST_CHUNK = 4 << 20  # bytes read and converted at a time: small enough to stay in the cache
DEVICE_CHUNK = 8 << 20  # bytes that fly to a GPU at a time
MOST_READERS = 8  # threads; the page cache gives no more than about their number's gigabytes a second


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some bytes of a tensor in a file, and where they go."""

    file: TensorFile
    entry: Entry
    start: int  # in the file
    dtype: torch.dtype  # in the file
    place: Tensor  # flat, on any device, in any dtype
    check: bool  # refuse NaN and infinity
    ready: object = None  # after which `place` may be written to; see `Courier.mark`

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.place.numel() * self.dtype.itemsize


Refuse = Callable[["Entry"], NoReturn]
"""Raises what is to be said of a tensor."""


class Mark(Protocol):
    """A moment in the work of a device."""

    def synchronize(self) -> None:
        """Wait until it has passed."""


class Courier(Protocol):
    """What takes memory of one thread to a device; `CudaCourier`, or a test's."""

    def buffer(self, nbytes: int) -> Tensor:
        """Host memory, flat uint8, from which copies may still be read when the thread has gone on."""

    def send(self, piece: Piece, staged: Tensor) -> tuple[Mark, list[Tensor]]:
        """Begin to copy `staged`, which has the file's dtype, to `piece.place`, converting it there.

        Returns:
            When `staged` may be overwritten; and, if asked to check, a bool on the device: whether numbers are not
            finite as read, and a second one, whether as stored, where a conversion can overflow.
        """

    def join(self) -> None:
        """Let what the caller's thread asks of the device from now on come after all that was sent."""


class HostLane:
    """One thread's way into host memory."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def carry(self, piece: Piece) -> None:
        """Read, convert and check; raises CorruptFileError and CheckpointError."""
        from octavo.checkpoint.tensors import check_finite

        if piece.place.dtype == piece.dtype:
            chunk = piece.place
        else:
            if self._buffer is None:
                self._buffer = torch.empty(HOST_CHUNK, dtype=torch.uint8)
            chunk = self._buffer[: piece.nbytes].view(piece.dtype)
        piece.file.fill(piece.entry, piece.start, chunk)
        if chunk is not piece.place:
            piece.place.copy_(chunk)
        if piece.check:
            check_finite(piece.entry, chunk, piece.place)

    def join(self) -> None:
        """All is there when `carry` returns."""

    def faults(self) -> list[tuple[Piece, Refuse]]:
        """None: all is checked when `carry` returns."""
        return []


class DeviceLane:
    """One thread's way to a device, through two buffers in turns."""

    def __init__(self, courier: Courier) -> None:
        self._courier = courier
        self._buffers: list[Tensor] = []
        self._marks: list[Mark | None] = [None, None]
        self._turn = 0
        self._flags: list[tuple[Piece, list[Tensor]]] = []

    def carry(self, piece: Piece) -> None:
        """Read, and send on its way."""
        self._turn ^= 1
        if not self._buffers:
            self._buffers = [self._courier.buffer(DEVICE_CHUNK) for _ in range(2)]
        if (mark := self._marks[self._turn]) is not None:
            mark.synchronize()
        staged = self._buffers[self._turn][: piece.nbytes].view(piece.dtype)
        piece.file.fill(piece.entry, piece.start, staged)
        self._marks[self._turn], flags = self._courier.send(piece, staged)
        if flags:
            self._flags.append((piece, flags))

    def join(self) -> None:
        """As `Courier.join`."""
        self._courier.join()

    def faults(self) -> list[tuple[Piece, Refuse]]:
        """What was found not to be finite, with what is to be said of it; one answer of the device for each kind."""
        from octavo.checkpoint.tensors import refuse_not_finite, refuse_overflow

        self._courier.join()
        for mark in self._marks:
            if mark is not None:
                mark.synchronize()
        flags, self._flags = self._flags, []
        found: list[tuple[Piece, Refuse]] = []
        for kind, refuse in enumerate((refuse_not_finite, refuse_overflow)):
            some = [(piece, told[kind]) for piece, told in flags if len(told) > kind]
            bad = torch.stack([flag for _, flag in some]).tolist() if some else []
            found += [(piece, refuse) for (piece, _), wrong in zip(some, bad, strict=True) if wrong]
        return found


class CudaCourier:
    """A stream of its own, beside those that compute."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def send(self, piece: Piece, staged: Tensor) -> tuple[Mark, list[Tensor]]:
        assert isinstance(piece.ready, torch.cuda.Event)
        with torch.cuda.stream(self._stream):
            # The memory of `place` may have belonged to work that the caller's stream has not finished yet.
            self._stream.wait_event(piece.ready)
            if staged.dtype == piece.place.dtype:
                arrived = piece.place.copy_(staged, non_blocking=True)
            else:
                # Converted there: between host and device torch would convert first, and wait.
                arrived = staged.to(self._device, non_blocking=True)
                piece.place.copy_(arrived)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
            return event, flags_of(piece, arrived)

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def flags_of(piece: Piece, arrived: Tensor) -> list[Tensor]:
    """The bools of `Courier.send`, where `arrived` is what was read, on the device."""
    if not piece.check or not arrived.dtype.is_floating_point:
        return []
    flags = [not_finite(arrived)]
    if piece.place.dtype == torch.float16 and arrived.dtype != torch.float16:
        flags.append(not_finite(piece.place))
    return flags


def not_finite(x: Tensor) -> Tensor:
    """Whether `x` holds NaN or infinity: a bool [], without waiting for the device."""
    if x.dtype in FORMATS:
        limit = FORMATS[x.dtype].first_non_finite_code
        return (x.view(torch.int8).amax() >= limit) | (x.view(torch.uint8).amax() >= 0x80 + limit)
    low, high = torch.aminmax(x)
    return ~(torch.isfinite(low) & torch.isfinite(high))


Lane = HostLane | DeviceLane


class Delivery:
    """Pieces under way, read by threads; use as a context manager.

    Args:
        device: where the places are; one that is neither a CPU nor CUDA gets one thread.
        readers: threads; None: as many as suit the device. With one, pieces are read when they are given.
        lane: makes the way of one thread; None: as suits the device.
    """

    def __init__(
        self, device: torch.device | str, *, readers: int | None = None, lane: Callable[[], Lane] | None = None
    ) -> None:
        device = torch.device(device)
        self._cuda = device.type == "cuda" and lane is None
        self.chunk = DEVICE_CHUNK if device.type == "cuda" or lane is not None else HOST_CHUNK
        self._make = lane or ((lambda: DeviceLane(CudaCourier(device))) if self._cuda else HostLane)
        readers = readers_for(device) if readers is None else readers
        self._pool = ThreadPoolExecutor(readers, "read", compute_on_one_core) if readers > 1 else None
        self._lanes: list[Lane] = []
        self._own = threading.local()
        self._under_way: list[Future[None]] = []

    def give(self, pieces: Sequence[Piece]) -> None:
        """Have these read; returns at once, save where there is one reader."""
        if self._pool is None:
            for piece in pieces:
                self._carry(piece)
        else:
            self._under_way += [self._pool.submit(self._carry, piece) for piece in pieces]

    def mark(self) -> object:
        """A moment of the caller's own work on the device, for `Piece.ready`."""
        if not self._cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self) -> None:
        """Until all that was given may be worked with: on a GPU by work that the caller asks for afterwards.

        Raises:
            CorruptFileError: the file ends early; on a CPU also: it holds NaN or infinity.
        """
        under_way, self._under_way = self._under_way, []
        for future in under_way:  # in the order given, so that of several errors it is always the same one
            future.result()
        for lane in self._lanes:
            lane.join()

    def finish(self) -> None:
        """`wait`, and whatever was left to check.

        Raises:
            CorruptFileError: the file ends early, or holds NaN or infinity.
            CheckpointError: a value is beyond float16's range.
        """
        self.wait()
        faults = [fault for lane in self._lanes for fault in lane.faults()]
        if faults:  # whichever thread found them, the first in the file is told
            piece, refuse = min(faults, key=lambda fault: (fault[0].entry.file, fault[0].start))
            refuse(piece.entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)  # after the pieces that are being read

    def _carry(self, piece: Piece) -> None:
        lane: Lane | None = getattr(self._own, "lane", None)
        if lane is None:
            lane = self._own.lane = self._make()
            self._lanes.append(lane)
        with _inference(piece.place):
            lane.carry(piece)


def readers_for(device: torch.device) -> int:
    """How many threads read for `device`: of a CPU as many as torch may use there, so that one means one."""
    if device.type == "cuda":
        return max(1, min(MOST_READERS, os.cpu_count() or 1))
    return min(MOST_READERS, torch.get_num_threads()) if device.type == "cpu" else 1


def _inference(place: Tensor) -> AbstractContextManager[object]:
    """What was made in inference mode can be filled only there, and that mode is each thread's own."""
    return torch.inference_mode() if place.is_inference() else nullcontext()
