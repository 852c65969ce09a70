"""The engine without its doors: what the batcher costs a step, what company gains, and how long a short run waits.

Everything in one process with the embedded model, pictures of 128x128 px; run by `benchmarks.server`. The plain loop
runs in the batcher's thread, as a piece of other work: each thread that computes has helpers of its own, and two sets
of them on one processor would slow both sides.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from time import perf_counter

from benchmarks.common import Timing, interleave, ratio, report
from octavo import Components, GenerateRequest, load
from octavo.devices import keep_freed_memory
from octavo.engine.batch import Batcher
from octavo.pipeline.generate import generate, generate_each, prepare, start
from octavo.pipeline.request import resolve
from octavo.pipeline.run import Run, Step, solve

PROMPTS = (
    "a large red star on a blue background",
    "a small green circle left of a yellow square",
    "a white triangle on a black background",
    "a purple star above a large orange circle",
)
SAMPLERS = ("euler", "dpmpp_2m", "heun", "euler_ancestral", "uni_pc", "dpmpp_2m_sde", "ddim", "deis")
STEPS = (8, 20, 12, 28)
MIXED = 16  # requests
FP8 = "octavo-demo-fp8.safetensors"  # the embedded model with FP8 weights
LONG, SHORT, AHEAD = 50, 4, 10  # steps of long and short requests, and how many long ones are ahead


def mixed() -> list[GenerateRequest]:
    """Requests that have nothing in common but the model and the size of the picture."""
    return [
        GenerateRequest(
            prompt=PROMPTS[i % len(PROMPTS)], sampler=SAMPLERS[i % len(SAMPLERS)], steps=STEPS[i % len(STEPS)], seed=i
        )
        for i in range(MIXED)
    ]


def measure_engine(repeats: int) -> None:
    """Print a line for each figure."""
    keep_freed_memory()
    batcher = Batcher()
    components = batcher.do(partial(load, device="cpu"))
    _overhead(components, batcher, repeats)
    _throughput(components, batcher, repeats)
    _wait(components, batcher, repeats)
    _throughput(batcher.do(partial(load, FP8, device="cpu")), batcher, repeats)
    batcher.close()


def _overhead(components: Components, batcher: Batcher, repeats: int) -> None:
    """Milliseconds that a step takes more by the batcher than by the plain loop, beside each other."""
    steps = 20
    run = _run(components, batcher, GenerateRequest(prompt=PROMPTS[0], sampler="euler", steps=steps, seed=1))
    alone, batched = partial(batcher.do, partial(solve, run, _quiet)), partial(batcher.solve, run, _quiet)
    timings = interleave({"alone": alone, "batcher": batched}, warmup=3, repeats=3 * repeats)
    extra = Timing(
        tuple(
            (ours - plain) / steps * 1e3
            for ours, plain in zip(timings["batcher"].seconds, timings["alone"].seconds, strict=True)
        )
    )
    report("engine_step", "ms", timings["alone"].median / steps * 1e3, what="a step by the plain loop", steps=steps)
    report("engine_step_overhead", "ms", extra, what="a step more by the batcher than by the plain loop", steps=steps)


def _throughput(components: Components, batcher: Batcher, repeats: int) -> None:
    """The same pictures one after the other by the plain loop, and all at once by the batcher."""
    requests = mixed()

    def one_by_one() -> None:
        for request in requests:
            batcher.do(partial(generate, components, request))

    def at_once() -> None:
        def draw(request: GenerateRequest) -> None:
            list(generate_each(components, request, solve=batcher.solve, on_device=batcher.do))

        with ThreadPoolExecutor(MIXED) as pool:
            list(pool.map(draw, requests))

    timings = interleave({"one by one": one_by_one, "at once": at_once}, warmup=1, repeats=repeats)
    told = {"requests": MIXED, "model": components.name}
    report("engine_mixed_one_by_one", "s", timings["one by one"], **told)
    report("engine_mixed_at_once", "s", timings["at once"], **told)
    gain = ratio(timings["one by one"], timings["at once"])
    report("engine_mixed_throughput", "times", gain, what="at once over one by one", **told)


def _wait(components: Components, batcher: Batcher, repeats: int) -> None:
    """How long a short run takes behind long ones: in the running batch, and first come, first served."""
    long = [
        _run(components, batcher, GenerateRequest(prompt=PROMPTS[i % 4], steps=LONG, seed=i, sampler="euler"))
        for i in range(AHEAD)
    ]
    short = _run(components, batcher, GenerateRequest(prompt=PROMPTS[0], steps=SHORT, seed=99, sampler="euler"))

    def served_in_order() -> float:
        begin = perf_counter()
        for run in (*long, short):
            batcher.do(partial(solve, run, _quiet))
        return perf_counter() - begin

    waits = {
        "in company": Timing(tuple(_short_among_long(batcher, long, short) for _ in range(repeats))),
        "in order": Timing(tuple(served_in_order() for _ in range(repeats))),
    }
    conditions = {"steps": SHORT, "ahead": AHEAD, "their_steps": LONG}
    report("engine_short_wait", "s", waits["in company"], what="a short run joins long ones", **conditions)
    report("engine_short_wait_in_order", "s", waits["in order"], what="first come, first served", **conditions)
    share = waits["in company"].p95 / waits["in order"].p95
    report("engine_short_wait_share", "times", share, what="p95 over p95 of first come, first served", **conditions)


def _short_among_long(batcher: Batcher, long: Sequence[Run], short: Run) -> float:
    """Seconds of the short run; the long ones have all begun by then, and are given up afterwards."""
    begun, enough = threading.Semaphore(0), threading.Event()

    def watch(step: Step) -> None:
        if step.done == 0:
            begun.release()
        if enough.is_set():
            raise InterruptedError

    def walk(run: Run) -> None:
        with suppress(InterruptedError):
            batcher.solve(run, watch)

    with ThreadPoolExecutor(len(long)) as pool:
        for run in long:
            pool.submit(walk, run)
        for _ in long:
            begun.acquire()
        begin = perf_counter()
        batcher.solve(short, _quiet)
        seconds = perf_counter() - begin
        enough.set()
    return seconds


def _run(components: Components, batcher: Batcher, request: GenerateRequest) -> Run:
    job = resolve(request, components.preset, model="", max_side=components.max_side)
    return batcher.do(lambda: start(components, job, prepare(components, job)))


def _quiet(_step: Step) -> None:
    """A watcher that does not care."""
