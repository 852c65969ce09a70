"""One layer at a time: every way to multiply by an FP8 weight and every way to attend, on the shapes of a model.

Beside the products runs F.linear with a weight that is not quantized. Errors are against the plain definition, so that
a fast way that is wrong shows here, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.devices import whole_processor
from octavo.evaluate.bench_ceilings import Ceilings
from octavo.evaluate.bench_costs import Work
from octavo.evaluate.bench_results import Results
from octavo.evaluate.bench_timing import NEVER, Deadline, Run, interleave
from octavo.fp8 import BACKENDS, E4M3FN, Problem, dequantize, quantize
from octavo.fp8.backends import Backend
from octavo.fp8.needs import RoundsInput, dtype_name
from octavo.models import MMDiTConfig
from octavo.models.attention import attention
from octavo.placement.attention import ATTENTION_BACKENDS, Case

DEFINITIONS = ("plain", "plain-wide", "plain-w8a8")


@dataclass(frozen=True, slots=True)
class Shape:
    """x [M, K] times a weight [N, K]."""

    what: str
    M: int
    K: int
    N: int


def shapes_of(config: MMDiTConfig, batch: int, height: int, width: int, tokens: int) -> Iterator[Shape]:
    """The products of a block for latents of `height` × `width` and `tokens` of text, each shape once."""
    patches = (height // config.patch_size) * (width // config.patch_size)
    inner, wide = config.width, config.mlp_ratio * config.width
    for stream, rows in (("image", batch * patches), ("text", batch * tokens)):
        yield Shape(f"{stream}.qkv", rows, inner, 3 * inner)
        yield Shape(f"{stream}.proj", rows, inner, inner)
        yield Shape(f"{stream}.fc1", rows, inner, wide)
        yield Shape(f"{stream}.fc2", rows, wide, inner)


def bench_linears(
    shapes: Iterable[Shape],
    prefix: str,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    results: Results,
    *,
    repeats: int = 10,
    deadline: Deadline = NEVER,
) -> None:
    """One line for each shape and way: `kernels.large.image.fc1.torch`, with its error and what it is of F.linear."""
    for shape in shapes:
        if deadline.passed:
            results.leave_out(f"{prefix}.{shape.what}", "no time was left")
            continue
        with results.guarded(f"{prefix}.{shape.what}"), torch.inference_mode(), whole_processor():
            _bench(shape, f"{prefix}.{shape.what}", device, dtype, ceilings, results, repeats, deadline)


def add_up(config: MMDiTConfig, shapes: Iterable[Shape], prefix: str, results: Results) -> None:
    """All products of a step with weights, from the lines of `bench_linears`: each shape as often as it occurs, by its
    fastest FP8 way (`kernels.large.products.fp8`), and likewise by F.linear. Nothing where a shape has no line."""
    for name in ("fp8", "F.linear"):
        seconds, bound, ways = 0.0, 0.0, dict[str, str]()
        for shape in shapes:
            start = f"{prefix}.{shape.what}."
            lines = [line for line in results.lines if line["name"].startswith(start)]
            lines = [line for line in lines if line["name"].endswith(".F.linear") == (name == "F.linear")]
            if not lines:
                return
            best = min(lines, key=lambda line: line["median"])
            count = times_in_step(config, shape.what)
            seconds, bound = seconds + count * best["median"], bound + count * best["bound"]
            ways[shape.what] = best["name"].removeprefix(start)
        results.add(f"{prefix}.products.{name}", seconds, bound=bound, conditions={"ways": ways})


def times_in_step(config: MMDiTConfig, what: str) -> int:
    """How often a product occurs: the last block's text has queries, keys and values alone, some images have two."""
    stream, layer = what.split(".")
    if stream == "text":
        return config.depth if layer == "qkv" else config.depth - 1
    return config.depth + (len(config.dual_attention) if layer in ("qkv", "proj") else 0)


def usable(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[list[Backend], dict[str, str]]:
    """The ways that can serve `shape` here, definitions aside, and why the others cannot."""
    problem = replace(
        Problem(N=shape.N, K=shape.K, format=E4M3FN, granularity="row", dtype=dtype, device="", mode="fast").on(device),
        rows=shape.M,
    )
    ways = [backend for backend in BACKENDS if backend.name not in DEFINITIONS]
    refused = {backend.name: reason for backend in ways if (reason := backend.refusal(problem)) is not None}
    return [backend for backend in ways if backend.name not in refused], refused


def _bench(
    shape: Shape,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    results: Results,
    repeats: int,
    deadline: Deadline,
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape.M, shape.K, device=device, generator=generator).to(dtype)
    weight = torch.randn(shape.N, shape.K, device=device, generator=generator).mul_(shape.K**-0.5)
    bias = torch.randn(shape.N, device=device, generator=generator).to(dtype)
    scaled = quantize(weight, E4M3FN, "row")
    exact = F.linear(x, dequantize(scaled, dtype), bias).float()
    unquantized = weight.to(dtype)
    del weight

    ways, _ = usable(shape, device, dtype)
    runs: dict[str, Run] = {"F.linear": partial(F.linear, x, unquantized, bias)}
    errors = dict[str, float]()
    for backend in ways:
        with results.guarded(f"{name}.{backend.name}"):
            ready = scaled if backend.twin is None else backend.twin(scaled)
            errors[backend.name] = distance(backend.run(x, ready, bias, None), exact)
            runs[backend.name] = partial(backend.run, x, ready, bias, None)
    timings = interleave(runs, warmup=2, repeats=repeats, deadline=deadline, many=True)
    work = Work(2.0 * shape.M * shape.K * shape.N)
    arithmetic = {backend.name: rounded_to(backend, dtype) for backend in ways}
    for way, timing in timings.items():
        made_in = arithmetic.get(way, dtype_name(dtype))
        stored = 1 if way in arithmetic else dtype.itemsize
        nbytes = (shape.M * (shape.K + shape.N)) * dtype.itemsize + shape.K * shape.N * stored
        results.add(
            f"{name}.{way}",
            timing,
            bound=ceilings.seconds(work, linear=made_in, other=made_in, nbytes=nbytes),
            conditions={
                "shape": [shape.M, shape.K, shape.N],
                "arithmetic": made_in,
                "over_linear": float(f"{timing.median / timings['F.linear'].median:.3g}"),
                **({"relative_error": float(f"{errors[way]:.3g}")} if way in errors else {}),
            },
        )


def bench_attention(
    shape: tuple[int, int, int, int],
    prefix: str,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    results: Results,
    *,
    repeats: int = 10,
    deadline: Deadline = NEVER,
) -> None:
    """One line for each way to attend, held against the rate of products in `dtype`: one that rounds may be beyond it.

    Args:
        shape: rows, tokens, heads and the width of a head.
    """
    batch, length, heads, width = shape
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(3))
    case = Case(
        dtype=dtype, device="", width=width, heads=heads, batch=batch, queries=length, keys=length, by_name=True
    )
    runs, errors = dict[str, Run](), dict[str, float]()
    with torch.inference_mode():
        exact = attention(q[:1].float(), k[:1].float(), v[:1].float())
        for backend in ATTENTION_BACKENDS:
            if backend.name.startswith("plain"):
                continue  # definitions of roundings, which hold every logit at once
            if (why := backend.refusal(case.on(device))) is not None:
                results.leave_out(f"{prefix}.{backend.name}", why)
                continue
            with results.guarded(f"{prefix}.{backend.name}"):
                errors[backend.name] = distance(backend.run(q, k, v)[:1], exact)
                runs[backend.name] = partial(backend.run, q, k, v)
        timings = interleave(runs, warmup=2, repeats=repeats, deadline=deadline, many=True)
    made_in = dtype_name(dtype)
    bound = ceilings.seconds(Work(0.0, 4.0 * batch * heads * width * length**2), linear=made_in, other=made_in)
    for name, timing in timings.items():
        told = {"shape": list(shape), "relative_error": float(f"{errors[name]:.3g}")}
        results.add(f"{prefix}.{name}", timing, conditions=told, bound=bound)


def rounded_to(backend: Backend, dtype: torch.dtype) -> str:
    """The dtype in which `backend` multiplies inputs of `dtype`."""
    return next((need.to for need in backend.needs if isinstance(need, RoundsInput)), dtype_name(dtype))


def distance(y: Tensor, exact: Tensor) -> float:
    """‖y − exact‖ / ‖exact‖ in float32; NaN stays NaN, which no bound admits."""
    return float((y.float() - exact.float()).norm() / exact.float().norm())
