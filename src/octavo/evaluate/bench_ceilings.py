"""What this device can do at most: copy and multiply, by the best library call on random data.

Every time of a benchmark stands beside the least that the same work would take at these rates. Zeros are never
multiplied: a GPU runs them faster than data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.devices import whole_processor
from octavo.evaluate.bench_costs import Work
from octavo.evaluate.bench_results import Results
from octavo.evaluate.bench_timing import NEVER, Deadline, Run, interleave
from octavo.fp8.formats import E4M3FN
from octavo.fp8.int8 import packed_twin
from octavo.fp8.matmul import CPU_INT8
from octavo.fp8.needs import Problem, dtype_name
from octavo.fp8.scale import Scaled, quantize

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SETS = 3  # of inputs, in turns, so that a cache that holds one of them does not hold the next


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates of one device.

    Attributes:
        copy: bytes a second, read and written counted both.
        rates: floating-point (or integer) operations a second of large matrix products, by the inputs' dtype:
            float32, bfloat16, float16, e4m3fn, int8, as far as the device multiplies in it.
    """

    copy: float
    rates: Mapping[str, float]

    def seconds(self, work: Work, *, linear: str, other: str, nbytes: float = 0.0) -> float:
        """The least that `work` can take: its products at their rates, or its bytes through memory, whichever is more.

        Args:
            linear: dtype in which products with weights are made.
            other: that of attention and convolutions.
            nbytes: that must be read or written at least once.
        """
        arithmetic = work.linear / self.rate(linear) + work.other / self.rate(other)
        return max(arithmetic, nbytes / self.copy)

    def rate(self, dtype: str) -> float:
        """Of products in `dtype`; where the device makes them otherwise, of the dtype that they are widened to."""
        return self.rates.get(dtype) or max(self.rates[name] for name in ("float32", "bfloat16") if name in self.rates)


def measure_ceilings(
    device: torch.device, results: Results, *, size: int | None = None, repeats: int = 10, deadline: Deadline = NEVER
) -> Ceilings:
    """Measure and report them: the best of all repeats, for what a device did once it can do.

    Args:
        size: side of the matrices; None: 8192 on a GPU, which a multiple of its caches, and 1024 on a CPU.
    """
    cuda = device.type == "cuda"
    size = size or (8192 if cuda else 1024)
    nbytes = size * size * (32 if cuda else 64)
    timing = interleave({"copy": _copy(nbytes, device)}, warmup=2, repeats=repeats, deadline=deadline)["copy"]
    copy = 2 * nbytes / min(timing.seconds)
    results.add("ceilings.copy", copy, "B/s", {"bytes": nbytes}, repeats=len(timing.seconds))

    flop = 2.0 * size**3
    rates = dict[str, float]()
    for dtype, ways in _products(device, size).items():
        best, way, repeated = 0.0, "", 0
        for name, make in ways.items():
            with results.guarded(f"ceilings.{dtype}.{name}"), torch.inference_mode(), whole_processor():
                found = interleave({name: make()}, warmup=3, repeats=repeats, deadline=deadline, many=True)[name]
                if flop / min(found.seconds) > best:
                    best, way, repeated = flop / min(found.seconds), name, len(found.seconds)
        if best:
            rates[dtype] = best
            results.add(f"ceilings.{dtype}", best, "FLOP/s", {"shape": [size] * 3, "by": way}, repeats=repeated)
    return Ceilings(copy, rates)


def _copy(nbytes: int, device: torch.device) -> Run:
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _products(device: torch.device, size: int) -> dict[str, dict[str, Callable[[], Run]]]:
    """By dtype the library's ways to multiply; each makes its inputs when it is its turn."""
    by_dtype: dict[str, dict[str, Callable[[], Run]]] = {
        dtype_name(dtype): {"F.linear": partial(_wide, device, size, dtype)} for dtype in FLOATS
    }
    if device.type == "cuda":
        by_dtype.pop("float32")  # which nothing here multiplies in on a GPU
        if torch.cuda.get_device_capability(device) >= (8, 9):
            by_dtype["e4m3fn"] = {
                f"_scaled_mm by {by}{', fast accumulation' * fast}": partial(_scaled, device, size, by == "row", fast)
                for by in ("tensor", "row")
                for fast in (True, False)
            }
        by_dtype["int8"] = {"_int_mm": partial(_int_mm, device, size)}
    elif device.type == "cpu":
        by_dtype.pop("float16")
        problem = Problem(
            N=size, K=size, format=E4M3FN, granularity="row", dtype=torch.float32, device="cpu", mode="fast"
        )
        if CPU_INT8.refusal(problem) is None:
            by_dtype["int8"] = {"onednn.qlinear_pointwise": partial(_onednn_int8, size)}
    return by_dtype


def _turns(calls: list[Run]) -> Run:
    """The calls one after the other, one each time."""
    turn = 0

    def run() -> object:
        nonlocal turn
        turn += 1
        return calls[turn % len(calls)]()

    return run


def _wide(device: torch.device, size: int, dtype: torch.dtype) -> Run:
    pairs = [[torch.randn(size, size, device=device).to(dtype) for _ in range(2)] for _ in range(SETS)]
    return _turns([partial(F.linear, x, weight) for x, weight in pairs])


def _scaled(device: torch.device, size: int, by_row: bool, fast: bool) -> Run:
    def draw() -> Tensor:
        return torch.randn(size, size, device=device).to(torch.float8_e4m3fn)

    ones = torch.ones(size, 1, device=device) if by_row else torch.ones((), device=device)
    across = ones.t().contiguous() if by_row else ones

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return torch._scaled_mm(
            x, weight.t(), scale_a=ones, scale_b=across, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    return _turns([partial(multiply, draw(), draw()) for _ in range(SETS)])


def _int_mm(device: torch.device, size: int) -> Run:
    def draw() -> Tensor:
        return torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)

    return _turns([partial(torch._int_mm, draw(), draw().t()) for _ in range(SETS)])


def _onednn_int8(size: int) -> Run:
    zeros = torch.zeros(size, dtype=torch.int64)

    def multiply(codes: Tensor, twin: Scaled) -> Tensor:
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, twin.q, twin.scale.flatten(), zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product

    def draw() -> tuple[Tensor, Scaled]:
        codes = torch.randint(0, 256, (size, size), dtype=torch.uint8)
        return codes, packed_twin(quantize(torch.randn(size, size), granularity="row"))

    return _turns([partial(multiply, *draw()) for _ in range(SETS)])
