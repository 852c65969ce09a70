"""What CUDA is asked for when work is captured, in which order; CUDA itself is played here."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.devices import Arriving, moved
from octavo.placement.cuda import CudaSeam

CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What CUDA was asked for."""
    calls: list[str] = []
    streams: list[str] = ["usual"]
    real = inspect.signature(torch.cuda.graph.__init__)

    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device == CPU

        def wait_stream(self, other: str) -> None:
            calls.append(f"its own waits for the {other}")

    @contextmanager
    def stream(_own: Stream) -> Iterator[None]:
        streams.append("own")
        yield
        streams.pop()

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    @contextmanager
    def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
        bound = real.bind(None, *args, **kwargs).arguments  # as torch has it
        assert isinstance(bound["cuda_graph"], Graph)
        assert isinstance(bound["stream"], Stream)
        calls.append(f"capture into {bound['pool']}, {bound['capture_error_mode']}")
        yield
        calls.append("captured")

    @contextmanager
    def device(_which: torch.device) -> Iterator[None]:
        yield

    pools = iter(("pool 1", "pool 2"))
    reserved = iter((100, 130, 130, 150, 150, 160))
    played: dict[str, Callable[..., Any]] = {
        "Stream": Stream, "stream": stream, "CUDAGraph": Graph, "graph": graph, "device": device,
        "graph_pool_handle": lambda: next(pools),
        "current_stream": lambda _device=None: streams[-1],
        "synchronize": lambda _device=None: calls.append("wait for all"),
        "empty_cache": lambda: calls.append("give back"),
        "memory_reserved": lambda _device=None: next(reserved),
    }  # fmt: skip
    for name, function in played.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(Tensor, "record_stream", lambda _x, which: calls.append(f"the {which} reads it"))
    return calls


def test_work_is_warmed_up_apart_and_then_captured(asked: list[str]) -> None:
    numbers = iter(range(9))

    def work() -> tuple[Tensor, int]:
        asked.append(f"work on the {torch.cuda.current_stream()}")
        return torch.full((2,), float(next(numbers))), 3

    seam = CudaSeam()
    recording = seam.record(work, CPU)
    assert asked == [
        "its own waits for the usual",
        "work on the own",
        "wait for all",
        "the usual reads it",
        "give back",
        "capture into pool 1, thread_local",
        "work on the usual",  # torch's context changes the stream, too
        "captured",
    ]
    assert recording.first[0].tolist() == [0, 0]
    assert recording.outputs[0].tolist() == [1, 1]
    assert recording.nbytes == 30
    recording.replay()
    assert asked[-1] == "replay"


def test_graphs_share_a_pool_until_none_is_left(asked: list[str]) -> None:
    seam = CudaSeam()
    for forget in (False, True, False):
        seam.record(lambda: torch.ones(1), CPU)
        if forget:
            seam.forget()
    assert [each.split(",")[0] for each in asked if each.startswith("capture into")] == [
        "capture into pool 1",
        "capture into pool 1",
        "capture into pool 2",
    ]


def test_what_a_cpu_has_is_there_already() -> None:
    """On a CPU nothing is pinned, and no event is asked for."""
    x = torch.tensor(True)
    assert Arriving(x).item() is True
    moved_to = moved(torch.ones(2), torch.zeros(1, dtype=torch.float64))
    assert moved_to.dtype == torch.float64
