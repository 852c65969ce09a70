"""Memory and clocks of a device, as block streaming needs them: the only lines that know CUDA.

`CudaMover` copies on a stream of its own beside the computation, and orders the two by events; the host waits for
nothing. `PlainMover` is its definition where everything happens at once: a "device" made of separate buffers in host
memory, so that plans can be run, and streaming proven, on any machine. On a CPU it only costs.
"""

import logging
import mmap
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Mark = Any
"""A point in what a device does: a copy that is done by then, or work that has read its memory by then."""


class Mover(Protocol):
    """Moves flat buffers of bytes.

    Attributes:
        device: where the work is done.
    """

    device: torch.device

    def host(self, nbytes: int) -> Tensor:
        """A buffer [nbytes] uint8 in host memory."""

    def pin(self, buffer: Tensor) -> None:
        """Have copies from a buffer of `host` be fast, now that it is filled."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is on the device already, where it may stay as it is."""

    def buffer(self, nbytes: int) -> Tensor:
        """A buffer [nbytes] uint8 on the device."""

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        """Begin to copy into the first bytes of `target`, once `after` has come, beside whatever is computed."""

    def wait(self, done: Mark) -> None:
        """What is computed from now on begins when this copy is done."""

    def mark(self) -> Mark:
        """Comes when all that was given to compute until now is done."""

    def finish(self) -> None:
        """Wait, here, until all copies are done; not for use within a step."""


def mover_for(device: torch.device) -> Mover:
    """What moves weights to this device."""
    return CudaMover(device) if device.type == "cuda" else PlainMover(device)


class CudaMover:
    """Pinned host memory, a stream for copies, events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host(self, nbytes: int) -> Tensor:
        # torch's own pinned memory comes in powers of two: of blocks of 142 MB that would be 80 % too much. Pages of
        # the system's, whole ones: two buffers that share a page could not both be pinned.
        return torch.frombuffer(_pages(max(nbytes, 1)), dtype=torch.uint8)[:nbytes]

    def pin(self, buffer: Tensor) -> None:
        address, nbytes = buffer.data_ptr(), buffer.numel()
        if not nbytes:
            return
        failed = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)  # type: ignore[no-untyped-call]
        if int(failed):
            logger.warning("%d bytes of host memory cannot be pinned (%s): copies from there are slow.", nbytes, failed)
        else:
            # The buffer's memory is kept, by its storage, until after this.
            storage = buffer.untyped_storage()
            weakref.finalize(buffer, _unpin, self.device, address, storage).atexit = False

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device == self.device

    def buffer(self, nbytes: int) -> Tensor:
        # Of the computing stream's memory: what was there before is read no more when `mark` comes.
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(after)
            target[: source.numel()].copy_(source, non_blocking=True)
            done.record(self._copies)
        return done

    def wait(self, done: Mark) -> None:
        torch.cuda.current_stream(self.device).wait_event(done)

    def mark(self) -> Mark:
        reached = torch.cuda.Event()  # type: ignore[no-untyped-call]
        reached.record(torch.cuda.current_stream(self.device))
        return reached

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


def _pages(nbytes: int) -> mmap.mmap:
    """Memory of this process's own; in large pages where the system has them, for then there are fewer to pin."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows, where it is private anyway
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system that was built without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _unpin(device: torch.device, address: int, memory: torch.UntypedStorage) -> None:  # noqa: ARG001  # kept until then
    """Before the memory goes back to the system, when no copy reads it any more."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class Event:
    """What a `PlainMover` was asked to do."""

    what: str  # copy, wait, mark
    number: int  # of the copy or the mark
    buffer: int = 0  # address of the copy's target
    nbytes: int = 0
    after: int = -1  # number of the mark that the copy waits for


@dataclass(slots=True, eq=False)
class PlainMover:
    """Plain copies within host memory.

    Attributes:
        late: put NaN into a buffer as soon as a copy to it is asked for, and the numbers only when somebody waits for
            them: then whoever reads too early, or too late, gets NaN.
        log: what was asked, in order, if `keep_log`.
        copied: bytes so far.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    late: bool = False
    keep_log: bool = False
    log: list[Event] = field(default_factory=list)
    copied: int = 0
    _numbers: int = 0
    _due: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    # Blocks and adaLN of one model share a mover, and may be called by two threads at once.
    _turn: Any = field(default_factory=RLock)

    def host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, buffer: Tensor) -> None:
        """Nothing to do: copies are as fast as they are."""

    def holds(self, tensor: Tensor) -> bool:  # noqa: ARG002  # the "device" is made of buffers of its own
        return False

    def buffer(self, nbytes: int) -> Tensor:
        made = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return made.fill_(NAN) if self.late else made

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        with self._turn:
            number = self._note("copy", target.data_ptr(), source.numel(), after)
            self.copied += source.numel()
            if self.late:
                target.fill_(NAN)
                self._due.append((number, source, target))
            else:
                target[: source.numel()].copy_(source)
            return number

    def wait(self, done: Mark) -> None:
        with self._turn:
            if self.keep_log:
                self.log.append(Event("wait", done))
            while self._due and self._due[0][0] <= done:
                _, source, target = self._due.pop(0)
                target[: source.numel()].copy_(source)

    def mark(self) -> Mark:
        return self._note("mark")

    def finish(self) -> None:
        self.wait(self._numbers)

    def _note(self, what: str, buffer: int = 0, nbytes: int = 0, after: int = -1) -> int:
        with self._turn:
            self._numbers += 1
            if self.keep_log:
                self.log.append(Event(what, self._numbers, buffer, nbytes, after))
            return self._numbers


NAN = 0xFF  # as every byte of a float of any size, of e4m3fn and e5m2: not a number
