"""Whether what is fast on a GPU is also right: every fast path against its plain definition, on true shapes.

    python -m benchmarks.gpu_checks --model large --out runs/bench/checks        # on the fastest device here
    python -m benchmarks.gpu_checks --model embedded --device cpu                # the same logic on a CPU

Each check is a line of JSON: an error with the bound that it must keep, drawn on fresh random inputs. What fails is
recorded with its traceback, and the next check begins. Part of `benchmarks.gpu`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.checkpoint.delivery import Delivery
from octavo.checkpoint.load import load_part
from octavo.checkpoint.plan import plan_part
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.source import open_source
from octavo.checkpoint.tensors import open_tensors
from octavo.devices import pick_device, pick_dtype, whole_processor
from octavo.errors import CorruptFileError, OctavoError
from octavo.evaluate.bench_kernels import distance, rounded_to, shapes_of, usable
from octavo.evaluate.bench_models import EMBEDDED, Wanted, open_model
from octavo.evaluate.bench_results import Results
from octavo.evaluate.bench_step import RELEASED_TOKENS, draw_inputs
from octavo.evaluate.bench_timing import Deadline, wait_for_device
from octavo.fp8 import E4M3FN, quantize
from octavo.fp8.matmul import plain_matmul, plain_w8a8
from octavo.models import MMDiT, MMDiTConfig
from octavo.models.attention import attention
from octavo.models.ops import PLAIN, PlainOps, each_with_ops, use_ops
from octavo.pipeline.assemble import EMBEDDED_MODEL
from octavo.pipeline.generate import finish, prepare, start
from octavo.pipeline.request import GenerateRequest, resolve
from octavo.pipeline.run import solve
from octavo.placement.attention import ATTENTION_BACKENDS, Case
from octavo.placement.graphs import captured_by, through
from octavo.placement.movers import mover_for
from octavo.placement.placed import place, placed_on
from octavo.placement.plan import Stay

ROUNDING = 1e-2  # bfloat16 on both sides of a product; a wrong index or scale is far beyond
STEP = 6e-2  # through all blocks: a number that was rounded once less may fall on the next code of FP8
EIGHT_BIT = 6e-2  # what attention in eight bits may lose on random heads, which are harder than trained ones
SAME_PICTURE = 35.0  # dB between float32 on two devices


@dataclass(frozen=True, slots=True)
class Checks:
    """A run of checks: on what, and where its findings go."""

    wanted: Wanted
    size: int  # pixels along a side
    results: Results
    deadline: Deadline

    def held(self, name: str, error: float, at_most: float, **told: object) -> None:
        """A finding; one beyond its bound counts as an error, too. NaN never passes."""
        kept = error <= at_most
        self.results.add(f"check.{name}", error, "error", {"at_most": at_most, "ok": kept, **told})
        if not kept:
            raise AssertionError(f"{name}: {error:.3g}, where {at_most:.3g} is the most")

    @property
    def rows(self) -> tuple[int, int, int]:
        """Height and width of latents, tokens of text."""
        return self.size // 8, self.size // 8, 20 if self.wanted.model == EMBEDDED else RELEASED_TOKENS


def products(checks: Checks) -> None:
    """Every way to multiply, on the shapes of the model."""
    device, dtype = checks.wanted.device, checks.wanted.dtype
    config = open_model(checks.wanted).mmdit.config
    assert isinstance(config, MMDiTConfig)
    for shape in shapes_of(config, 2, *checks.rows):
        x = torch.randn(shape.M, shape.K, device=device).to(dtype)
        weight = quantize(torch.randn(shape.N, shape.K, device=device) * shape.K**-0.5, E4M3FN, "row")
        bias = torch.randn(shape.N, device=device).to(dtype)
        exact = plain_matmul(x.float(), weight, bias.float(), None)
        rounded = plain_w8a8(x, weight, bias, None)
        for backend in usable(shape, device, dtype)[0]:
            with checks.results.guarded(f"check.products.{shape.what}.{backend.name}"):
                ready = weight if backend.twin is None else backend.twin(weight)
                out = backend.run(x, ready, bias, None)
                to = rounded_to(backend, dtype)
                reference, bound = (rounded, ROUNDING) if to == "e4m3fn" else (exact, 2 * ROUNDING)
                checks.held(f"products.{shape.what}.{backend.name}", distance(out, reference), bound, rounds_to=to)


def attending(checks: Checks) -> None:
    """Every way to attend, against float32."""
    device, dtype = checks.wanted.device, checks.wanted.dtype
    config = open_model(checks.wanted).mmdit.config
    assert isinstance(config, MMDiTConfig)
    height, width, tokens = checks.rows
    length, head = height * width // 4 + tokens, config.width // config.heads
    q, k, v = (torch.randn(1, length, config.heads, head, device=device).to(dtype) for _ in range(3))
    exact = attention(q.float(), k.float(), v.float())
    case = replace(Case(dtype=dtype, device="", width=head, by_name=True).on(device), queries=length, keys=length)
    for backend in ATTENTION_BACKENDS:
        name = f"attention.{backend.name}"
        if (why := backend.refusal(case)) is not None:
            checks.results.leave_out(f"check.{name}", why)
            continue
        with checks.results.guarded(f"check.{name}"):
            bound = EIGHT_BIT if backend.rounds else ROUNDING
            checks.held(name, distance(backend.run(q, k, v), exact), bound)


def steps(checks: Checks) -> None:
    """A step by fused kernels, by graphs and with streamed weights, beside the plain, eager, resident one."""
    wanted = checks.wanted
    mmdit = open_model(wanted).mmdit()
    run = _step_of(mmdit, checks)
    eager = run(mmdit)
    if not bool(eager.isfinite().all()):
        raise AssertionError("a step gives NaN or infinity")
    checks.held("step.twice", _differing(run(mmdit), eager), 0.0, what="the same step again", bits="equal")
    with checks.results.guarded("check.step.graphs"):
        if captured_by(mmdit) is None:
            raise OctavoError(f"nothing is captured on {wanted.device.type}")
        for number in range(4):  # eager, captured, replayed, replayed
            replayed = run(through(mmdit))
            checks.held(f"step.graphs.{number}", _differing(replayed, eager), 0.0, bits="equal")
        checks.results.add("check.step.graphs.told", 1.0, "x", {"captured": str(captured_by(mmdit))})
    with checks.results.guarded("check.step.fused"):
        fused: list[Any] = [part.ops for part in each_with_ops(mmdit)]
        if all(isinstance(ops, PlainOps) for ops in fused):
            raise OctavoError("the steps between products are plain here")
        use_ops(mmdit, PLAIN)
        plain = run(mmdit)
        for part, ops in zip(each_with_ops(mmdit), fused, strict=True):
            part.ops = ops
        checks.held("step.fused", distance(eager, plain), STEP)
    with checks.results.guarded("check.step.streamed"):
        depth = mmdit.config.depth
        placed = placed_on(mmdit)
        for resident in (depth // 2, 0):
            stay = Stay(resident=resident, layers=depth)
            if placed is None:
                placed = place(mmdit, stay, mover_for(wanted.device))
            else:
                placed.move(stay)
            name = f"step.streamed.{resident}_of_{depth}"
            checks.held(name, _differing(run(mmdit), eager), 0.0, bits="equal", placed=str(placed))


def loading(checks: Checks) -> None:
    """Files read by many threads are on the device what they are on the host, and NaN is found there."""
    device = checks.wanted.device
    with open_source(EMBEDDED_MODEL) as source:
        states = [
            load_part(plan_part(source.require("mmdit")), where, torch.bfloat16).state_dict()
            for where in ("cpu", device)
        ]
    differing = sum(not torch.equal(states[0][name], tensor.cpu()) for name, tensor in states[1].items())
    checks.held("loading.embedded", float(differing), 0.0, tensors=len(states[0]))
    numel = 40_000_000 if device.type == "cuda" else 100_000
    with tempfile.TemporaryDirectory() as folder:
        large = {"a": torch.randn(numel // 1000, 1000), "b": torch.randn(numel).to(torch.bfloat16)}
        path = Path(folder) / "large.safetensors"
        save_safetensors(path, large)
        with open_tensors(path) as file:
            for dtype in (torch.float32, torch.bfloat16):
                places = {name: torch.full(t.shape, 7.0, dtype=dtype, device=device) for name, t in large.items()}
                start_at = time.perf_counter()
                with Delivery(device) as delivery:
                    for name, place in places.items():
                        file.deliver(delivery, name, place)
                    delivery.finish()
                wait_for_device()
                seconds = time.perf_counter() - start_at
                wrong = sum(not torch.equal(place.cpu(), large[name].to(dtype)) for name, place in places.items())
                rate = sum(entry.nbytes for entry in file.entries.values()) / seconds
                checks.held(f"loading.{str(dtype)[6:]}", float(wrong), 0.0, bytes_a_second=float(f"{rate:.3g}"))
        large["b"][numel // 2] = torch.nan
        save_safetensors(path, large)
        try:
            with open_tensors(path) as file, Delivery(device) as delivery:
                file.deliver(delivery, "b", torch.empty(numel, dtype=torch.bfloat16, device=device))
                delivery.finish()
        except CorruptFileError:
            checks.held("loading.nan_is_found", 0.0, 0.0)
        else:
            checks.held("loading.nan_is_found", 1.0, 0.0)


def picture(checks: Checks) -> None:
    """The embedded model's picture in float32 is that of the CPU, and nearly so in the dtype in which it draws here."""
    pictures = {}
    for name, device, dtype in (
        ("cpu", torch.device("cpu"), torch.float32),
        ("float32", checks.wanted.device, torch.float32),
        ("usual", checks.wanted.device, checks.wanted.dtype),
    ):
        components = open_model(Wanted(model=EMBEDDED, device=device, dtype=dtype, fp8=name == "usual"))
        request = GenerateRequest(prompt="a large red star on a blue background", seed=1, steps=4, width=64, height=64)
        job = resolve(request, components.preset, model=components.name, max_side=components.max_side)
        latents = solve(start(components, job, prepare(components, job)), lambda _step: None)
        pictures[name] = np.asarray(finish(components, job, latents)).astype(np.float64)
    for name, least in (("float32", SAME_PICTURE), ("usual", 15.0)):
        error = np.sqrt(((pictures[name] - pictures["cpu"]) ** 2).mean()) / 255
        checks.held(f"picture.{name}", float(error), 10 ** (-least / 20), decibels_at_least=least)


CHECKS: tuple[Callable[[Checks], None], ...] = (products, steps, loading, attending, picture)


def _step_of(mmdit: MMDiT, checks: Checks) -> Callable[[Callable[..., Tensor]], Tensor]:
    height, width, tokens = checks.rows
    inputs = draw_inputs(mmdit.config, 2, height, width, tokens).to(checks.wanted.device, checks.wanted.dtype)
    table = mmdit.modulation(inputs.timestep, inputs.pooled)
    return lambda call: call(inputs.latents, inputs.context, table)


def _differing(one: Tensor, other: Tensor) -> float:
    """Share of numbers that are not equal to the last bit."""
    return float((one != other).float().mean())


def run(checks: Checks) -> None:
    """All checks, each on its own."""
    for check in CHECKS:
        name = f"check.{check.__name__}"
        if checks.deadline.passed:
            checks.results.leave_out(name, "no time was left")
            continue
        with checks.results.guarded(name), torch.inference_mode(), whole_processor():
            check(checks)
        if checks.wanted.device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="large", help="large, medium or embedded")
    parser.add_argument("--size", type=int, default=1024, help="pixels along a side")
    parser.add_argument("--device", help="the fastest if unsaid")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/checks"))
    options = parser.parse_args()
    device = pick_device(options.device)
    wanted = Wanted(model=options.model, device=device, dtype=pick_dtype(None, device))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "bench.jsonl").open("w", encoding="utf-8") as log:
        results = Results(device, log)
        run(Checks(wanted, options.size, results, Deadline(options.seconds)))
    for line in results.lines:
        print(f"{line['name']}: {line['median']:.3g} {line['conditions']}")
    for entry in (*results.absent, *results.errors):
        print(entry)


if __name__ == "__main__":
    main()
