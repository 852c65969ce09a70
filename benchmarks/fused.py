"""Fused steps between a block's products beside the plain ones and beside what moving their bytes takes.

On a GPU each step runs as a CUDA graph of many launches, so that Python's share is out of the times; the floor is what
a plain copy of as many bytes takes on the same device in the same minute. One line of JSON for each step and way.

    python -m benchmarks.fused                     # SD3.5 Large at 1024×1024, two rows, on the GPU
    python -m benchmarks.fused --model medium
    python -m benchmarks.fused --check             # small shapes on any machine, interpreted: right or wrong
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Timing, measure, report
from octavo.fp8.int8 import quantize_int8
from octavo.fp8.modulate import DEFINITIONS, Kernels, Stream, Taker, triton_kernels
from octavo.fp8.scale import Form, Scaled, quantize_input

LAUNCHES = 20  # in one graph
TEXT = 333  # tokens
EPS = 1e-6
Way = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Size:
    """A model's step."""

    rows: int  # of the batch
    tokens: int  # of the image
    text: int
    width: int
    heads: int


LARGE = Size(2, 4096, TEXT, 2432, 38)
MEDIUM = Size(2, 4096, TEXT, 1536, 24)
SMALL = Size(2, 5, 3, 70, 2)


@dataclass(frozen=True, slots=True)
class Case:
    """One step: fused, plain as torch's operations one by one, and the bytes that it cannot but move."""

    what: str
    fused: Way
    definition: Way
    plain: Way
    nbytes: int


def cases(size: Size, kernels: Kernels, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every step of a block, and the rounding of a layer's input alone."""
    from octavo.fp8.kernels.quantize import quantize_rows

    B, L, D = size.rows, size.tokens, size.width
    x, branch = (torch.randn(B, L, D, device=device).to(dtype) for _ in range(2))
    shift, scale, gate, shift2, scale2 = torch.randn(B, 5, D, device=device).to(dtype).unbind(1)
    hidden = torch.randn(B, L, 4 * D, device=device).to(dtype)
    wide, codes = x.nbytes, x.numel()

    forms: tuple[Form, ...] = ("e4m3fn", "int8")
    for form in forms:
        one, two = Taker(shift, scale, form), Taker(shift2, scale2, form)
        yield Case(
            f"norm, modulation → {form}",
            lambda one=one: kernels.modulated(x, one),  # type: ignore[misc]
            lambda one=one: DEFINITIONS.modulated(x, one),  # type: ignore[misc]
            lambda one=one: _rounded(_modulated(x, one), one.form),  # type: ignore[misc]
            wide + codes,
        )
        yield Case(
            f"norm, two modulations → {form}",
            lambda one=one, two=two: kernels.modulated(x, one, two),  # type: ignore[misc]
            lambda one=one, two=two: DEFINITIONS.modulated(x, one, two),  # type: ignore[misc]
            lambda one=one, two=two: [_rounded(_modulated(x, each), each.form) for each in (one, two)],  # type: ignore[misc]
            wide + 2 * codes,
        )
        yield Case(
            f"gate, residual, norm, modulation → {form}",
            lambda one=one: kernels.residual_modulated(x, gate, branch, one),  # type: ignore[misc]
            lambda one=one: DEFINITIONS.residual_modulated(x, gate, branch, one),  # type: ignore[misc]
            lambda one=one: _rounded(_modulated(torch.addcmul(x, gate[:, None], branch), one), one.form),  # type: ignore[misc]
            3 * wide + codes,
        )
        yield Case(
            f"GELU → {form}",
            lambda form=form: kernels.gelu(hidden, form, None),  # type: ignore[misc]
            lambda form=form: DEFINITIONS.gelu(hidden, form, None),  # type: ignore[misc]
            lambda form=form: _rounded(F.gelu(hidden, approximate="tanh"), form),  # type: ignore[misc]
            hidden.nbytes + hidden.numel(),
        )
        for what, rows in (("width", x.view(B * L, D)), ("hidden", hidden.view(B * L, -1))):
            yield Case(
                f"{what} → {form}",
                lambda rows=rows, form=form: quantize_rows(rows, form=form),  # type: ignore[misc]
                lambda rows=rows, form=form: _rounded(rows, form),  # type: ignore[misc]
                lambda rows=rows, form=form: _rounded(rows, form),  # type: ignore[misc]
                rows.nbytes + rows.numel(),
            )
    yield Case(
        "gate, residual",
        lambda: kernels.residual(x, gate, branch),
        lambda: DEFINITIONS.residual(x, gate, branch),
        lambda: torch.addcmul(x, gate[:, None], branch),
        3 * wide,
    )
    E = D // size.heads
    qkv = [torch.randn(B, length, 3 * D, device=device).to(dtype) for length in (size.text, L)]
    weights = [torch.rand(E, device=device).to(dtype) + 0.5 for _ in range(2)]
    streams = [Stream(each, size.heads, weights[0], weights[1], EPS) for each in qkv]
    yield Case(
        "qk-norm, heads of both streams",
        lambda: kernels.heads(*streams),
        lambda: DEFINITIONS.heads(*streams),
        lambda: _heads(streams),
        2 * sum(each.nbytes for each in qkv),
    )


def _modulated(x: Tensor, taker: Taker) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(taker.shift[:, None], normed, 1 + taker.scale[:, None])


def _rounded(y: Tensor, form: Form | None) -> Scaled:
    rows = y.view(-1, y.shape[-1])
    return quantize_int8(rows) if form == "int8" else quantize_input(rows, None)


def _heads(streams: list[Stream]) -> list[Tensor]:
    parts = []
    for qkv, heads, of_q, of_k, eps in streams:
        q, k, v = qkv.view(*qkv.shape[:2], 3, heads, -1).unbind(2)
        parts.append((F.rms_norm(q, q.shape[-1:], of_q, eps), F.rms_norm(k, k.shape[-1:], of_k, eps), v))
    return [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]


def times(size: Size, device: torch.device, dtype: torch.dtype) -> None:
    """A line for each step: fused and plain, with their shares of what the bytes take."""
    triton = triton_kernels()
    bandwidth = _bandwidth(device)
    report("fused_bandwidth", "bytes/s", bandwidth)
    for case in cases(size, triton, device, dtype):
        floor = case.nbytes / bandwidth
        for way, run in (("fused", case.fused), ("plain", case.plain)):
            timing = _timed(run)
            share = round(floor / timing.median, 3)
            report("fused_step", "s", timing, step=case.what, way=way, shape=str(size), floor=floor, of_floor=share)


def _bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a plain copy."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _timed(lambda: target.copy_(source)).median


def _timed(run: Way) -> Timing:
    """Seconds of one run, from graphs of `LAUNCHES`."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and takes memory, before the capture
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(LAUNCHES):
            run()
    whole = measure(graph.replay, warmup=3, repeats=20)
    return Timing(tuple(seconds / LAUNCHES for seconds in whole.seconds))


def check(device: torch.device) -> int:
    """A line for each step: how far it is from its definition; the number of steps that are too far."""
    wrong = 0
    for case in cases(SMALL, triton_kernels(), device, torch.float32):
        codes, values = _distance(case.fused(), case.definition())
        wrong += not (codes <= 1e-3 and values <= 1e-5)
        print(json.dumps({"name": "fused_check", "step": case.what, "other_codes": codes, "relative_error": values}))
    return wrong


def _distance(ours: object, theirs: object) -> tuple[float, float]:
    """The share of codes that differ, and the relative error of everything that has no codes."""
    codes, values = 0.0, 0.0
    mine, others = (list(each) if isinstance(each, list | tuple) else [each] for each in (ours, theirs))
    for a, b in zip(mine, others, strict=True):
        if isinstance(a, Scaled) and isinstance(b, Scaled):
            codes = max(codes, float((a.q.float() != b.q.float()).float().mean()))
            a, b = a.scale, b.scale
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        values = max(values, float((a - b).norm() / b.norm()))
    return codes, values


def main() -> None:
    """Print one JSON line for each figure; with --check, exit with 1 if any step is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("large", "medium"), default="large")
    parser.add_argument("--check", action="store_true", help="compare with the definitions, on any machine")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    here = torch.cuda.is_available()
    if options.check:
        if not here:
            os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        raise SystemExit(int(check(torch.device("cuda" if here else "cpu")) > 0))
    if not here:
        raise SystemExit("Times are of a GPU, and there is none here. To see whether the kernels are right: --check.")
    times(LARGE if options.model == "large" else MEDIUM, torch.device("cuda"), torch.bfloat16)


if __name__ == "__main__":
    main()
