"""CUDA's side of `graphs`: what records and replays on the device, and nothing that decides."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from octavo.devices import free_bytes
from octavo.placement.arguments import tensors_in


@dataclass(slots=True, eq=False)
class CudaRecording:
    """A CUDA graph with the tensors that it writes its results to."""

    graph: torch.cuda.CUDAGraph
    first: Any
    outputs: Any
    nbytes: int

    def replay(self) -> None:
        """Start it on the current stream; the host goes on at once."""
        self.graph.replay()


class CudaSeam:
    """Graphs that share a pool of memory: they are replayed one after the other, and one's scratch is another's."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def refusal(self, device: torch.device) -> str | None:
        """Why nothing can be captured on `device`; None where it can."""
        return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, this is {device.type}"

    def free(self, device: torch.device) -> int | None:
        """Bytes of its memory that are free."""
        return free_bytes(device)

    def record(self, work: Callable[[], Any], device: torch.device) -> CudaRecording:
        """Run `work` once on a stream of its own, so that all it sets up lies outside of the graph; then capture it.

        Raises:
            RuntimeError: it does what a graph cannot hold, such as waiting for the device; or memory does not suffice.
        """
        with torch.cuda.device(device):
            if self._stream is None or self._pool is None:
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                self._pool = torch.cuda.graph_pool_handle()
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                first = work()
            torch.cuda.synchronize(device)
            made: list[torch.Tensor] = []
            tensors_in(first, made)
            for tensor in made:  # it was made for the other stream, and is read by this one
                tensor.record_stream(torch.cuda.current_stream(device))
            # What the run before left to this stream and to the usual one is not used again: the graph has a pool.
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(device)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": other threads, which decode pictures or ask for free memory, do not break the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = work()
            return CudaRecording(graph, first, outputs, max(0, torch.cuda.memory_reserved(device) - before))

    def forget(self) -> None:
        """The next recording begins a new pool."""
        self._pool = None
