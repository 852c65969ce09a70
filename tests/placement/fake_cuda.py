"""A CUDA that only notes what it is asked, for machines without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from octavo.placement.movers import CudaMover

Note = tuple[Any, ...]


class FakeCuda:
    """torch.cuda, as far as the mover knows it; copies are those of the CPU."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self.pinned: dict[int, int] = {}
        self.refuses = 0
        self.events = 0
        cuda = self

        class Stream:
            def __init__(self, _device: object = None) -> None:
                self.name = "copies"

            def wait_event(self, event: "Event") -> None:
                cuda.notes.append((self.name, "wait", event.number))

        class Event:
            def __init__(self) -> None:
                cuda.events += 1
                self.number = cuda.events

            def record(self, stream: Stream) -> None:
                cuda.notes.append((stream.name, "record", self.number))

        self.Stream, self.Event = Stream, Event
        self.computing = Stream()
        self.computing.name = "compute"

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.notes.append((stream.name, "begin"))
        yield
        self.notes.append((stream.name, "end"))

    def current_stream(self, _device: object) -> Any:
        return self.computing

    def synchronize(self, _device: object) -> None:
        self.notes.append(("host", "synchronize"))

    def cudart(self) -> "FakeCuda":
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        if not self.refuses:
            self.pinned[address] = nbytes
        return self.refuses

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take torch.cuda's place, as far as the mover knows it."""
        for name in ("Stream", "Event", "stream", "current_stream", "synchronize", "cudart"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))


class Mover(CudaMover):
    """Of a device whose memory is the CPU's, but other memory."""

    def holds(self, tensor: torch.Tensor) -> bool:  # noqa: ARG002
        return False
