"""`octavo bench`: what this device reaches, of what it could; suites in the order in which they are asked for.

    ceilings  copy bandwidth and rates of matrix products: what every other time is held against
    kernels   linear layers one by one, every way to multiply by FP8 weights; fused kernels; attention
    step      one step of the transformer, in every variant that makes sense here
    picture   encode, denoise, decode, whole
    cold      process start to first picture, in processes of their own, weights in the page cache
    memory    peaks, beside what the memory plan predicts

Lines are written as they come; what fails is recorded and does not stop the rest.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from octavo.errors import RequestError, did_you_mean
from octavo.evaluate import bench_cold
from octavo.evaluate.bench_ceilings import Ceilings, measure_ceilings
from octavo.evaluate.bench_kernels import add_up, bench_attention, bench_linears, shapes_of
from octavo.evaluate.bench_memory import bench_memory, memory_variants
from octavo.evaluate.bench_models import EMBEDDED, Wanted, open_model, write_random
from octavo.evaluate.bench_peers import Peers
from octavo.evaluate.bench_picture import Sheet, bench_picture
from octavo.evaluate.bench_plot import bar_chart
from octavo.evaluate.bench_results import Results
from octavo.evaluate.bench_step import RELEASED_TOKENS, bench_step, variants_here
from octavo.evaluate.bench_timing import Deadline
from octavo.fp8.needs import dtype_name
from octavo.models import MMDiTConfig
from octavo.pipeline.latents import FACTOR

SUITES = ("ceilings", "kernels", "step", "picture", "memory", "cold")
LEAST = 10  # repeats of ceilings, which everything else is held against
ROOM = 20 << 30  # bytes of a model's file, and some
LOG, JSON, PLOT = "bench.jsonl", "bench.json", "bench.svg"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        model: "embedded", "large" or "medium" (random weights), or a name or path of a model.
        width, height: in pixels; None: as suits the model and the device.
        steps: of pictures; None: 20, or as suits the embedded model.
        batch: rows of a step.
        seconds: after which nothing new is begun.
        compile: also measure a step whose blocks torch.compile has made.
        peers: run diffusers and torchao in the same turns, where they are installed.
        out: folder for the log, the JSON and the plot.
    """

    model: str = EMBEDDED
    suites: tuple[str, ...] = ("ceilings", "step", "picture")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    batch: int = 2
    repeats: int | None = None
    seconds: float = float("inf")
    peers: bool = False
    compile: bool = False
    out: Path = Path("runs/bench/octavo")

    def __post_init__(self) -> None:
        for suite in self.suites:
            if suite not in SUITES:
                known = ", ".join(SUITES)
                raise RequestError(f"There is no suite '{suite}'. Use {known}, or all.{did_you_mean(suite, SUITES)}")
        for name in ("width", "height", "steps", "batch", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1.")
        if any(side is not None and side % 16 for side in (self.width, self.height)):
            raise RequestError(f"The size is {self.width}x{self.height}; sides must be divisible by 16.")
        if not self.seconds > 0:
            raise RequestError(f"--seconds is {self.seconds}; it must be more than 0.")

    @property
    def wanted(self) -> Wanted:
        """The model as the first variant has it."""
        return Wanted(model=self.model, device=self.device, dtype=self.dtype)


def run(options: Options, *, command: str = "", tell: Callable[[str], None] = lambda _line: None) -> Results:
    """Run the suites and write `out`/bench.json and bench.svg.

    Args:
        command: what was typed, for the JSON.
        tell: told of each suite as it begins.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(options.seconds)
    with (options.out / LOG).open("w", encoding="utf-8") as log:
        results = Results(options.device, log)
        bench = Bench(options, results, deadline)
        for suite in options.suites:
            if deadline.passed:
                results.leave_out(suite, "no time was left")
                continue
            tell(suite)
            with results.guarded(suite):
                SUITE[suite](bench)
    (options.out / JSON).write_text(json.dumps(results.as_json(command), indent=1) + "\n", "utf-8")
    title = f"{options.model} on {results.as_json()['device']}: share of the measured ceiling"
    (options.out / PLOT).write_text(bar_chart(title, results.lines) + "\n", "utf-8")
    return results


class Bench:
    """A run under way: what the suites share."""

    def __init__(self, options: Options, results: Results, deadline: Deadline) -> None:
        self.options, self.results, self.deadline = options, results, deadline
        self._ceilings: Ceilings | None = None
        components = open_model(options.wanted)
        config = components.mmdit.config
        assert isinstance(config, MMDiTConfig)
        self.config = config
        preset, cpu = components.preset, options.device.type == "cpu"
        small = cpu and options.model != EMBEDDED  # a released model takes a CPU minutes at full size
        self.width = options.width or (256 if small else preset.width)
        self.height = options.height or options.width or (256 if small else preset.height)
        self.steps = options.steps or (preset.steps if options.model == EMBEDDED else 4 if cpu else 20)
        self.repeats = options.repeats or (3 if small else 10)
        self.tokens = 2 * components.text.positions if options.model == EMBEDDED else RELEASED_TOKENS

    @property
    def latents(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.height // FACTOR, self.width // FACTOR

    @property
    def sheet(self) -> Sheet:
        """What is drawn where pictures are."""
        return Sheet(width=self.width, height=self.height, steps=self.steps)

    @property
    def ceilings(self) -> Ceilings:
        """Of the device; measured when first asked for."""
        if self._ceilings is None:
            self._ceilings = measure_ceilings(
                self.options.device, self.results, repeats=max(LEAST, self.repeats), deadline=self.deadline
            )
        return self._ceilings


def _ceilings(bench: Bench) -> None:
    assert bench.ceilings.copy > 0


def _kernels(bench: Bench) -> None:
    options = bench.options
    shapes = list(shapes_of(bench.config, options.batch, *bench.latents, bench.tokens))
    prefix = f"kernels.{options.wanted.name}"
    bench_linears(
        shapes, prefix, options.device, options.dtype, bench.ceilings, bench.results,
        repeats=bench.repeats, deadline=bench.deadline,
    )  # fmt: skip
    add_up(bench.config, shapes, prefix, bench.results)
    height, width = bench.latents
    length = height * width // bench.config.patch_size**2 + bench.tokens
    bench_attention(
        (options.batch, length, bench.config.heads, bench.config.width // bench.config.heads),
        f"{prefix}.attention", options.device, options.dtype, bench.ceilings, bench.results,
        repeats=bench.repeats, deadline=bench.deadline,
    )  # fmt: skip


def _step(bench: Bench) -> None:
    options = bench.options
    height, width = bench.latents
    peers = Peers(bench.results, options.device, options.dtype)
    also = peers.steps(bench.config, options.batch, height, width, bench.tokens) if options.peers else {}
    variants = variants_here(options.wanted)
    if options.compile:
        variants["fp8_compiled"] = replace(variants["fp8"], compile=True)
    timings = bench_step(
        variants, bench.ceilings, bench.results,
        batch=options.batch, height=height, width=width, tokens=bench.tokens, repeats=bench.repeats,
        deadline=bench.deadline, also=also,
    )  # fmt: skip
    peers.compare(timings, set(also), f"step.{options.wanted.name}")


def _picture(bench: Bench) -> None:
    options = bench.options
    peers = Peers(bench.results, options.device, options.dtype)
    variants = variants_here(options.wanted)
    timings = bench_picture(
        variants, bench.sheet, bench.ceilings, bench.results, repeats=min(5, bench.repeats), deadline=bench.deadline,
        also=(lambda components: peers.pictures(components, bench.sheet)) if options.peers else lambda _components: {},
    )  # fmt: skip
    peers.compare(timings, set(timings) - set(variants), f"picture.{options.wanted.name}")


def _memory(bench: Bench) -> None:
    bench_memory(
        memory_variants(bench.options.wanted), bench.sheet, bench.results, bench.options.device,
        prefix=f"memory.{bench.options.wanted.name}", deadline=bench.deadline,
    )  # fmt: skip


def _cold(bench: Bench) -> None:
    options, wanted = bench.options, bench.options.wanted
    prefix = f"cold.{wanted.name}"
    settings: dict[str, object] = {
        "steps": bench.steps, "width": bench.width, "height": bench.height,
        "device": str(options.device), "dtype": dtype_name(options.dtype), "threads": torch.get_num_threads(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=_in_memory() if wanted.random else None) as folder:
        model: str | None = None if wanted.model == EMBEDDED else wanted.model
        if wanted.random:
            path = Path(folder) / f"random-{wanted.model}.safetensors"
            write_random(wanted.model, path)
            model = str(path)
        bench_cold.bench_cold(
            {**settings, "model": model}, prefix, bench.results, repeats=min(3, bench.repeats), deadline=bench.deadline
        )


def _in_memory() -> Path | None:
    """Where a file lies in the page cache from the start, if that has room for a model; None for the usual place."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() and shutil.disk_usage(folder).free > ROOM else None


SUITE: Mapping[str, Callable[[Bench], None]] = {
    "ceilings": _ceilings, "kernels": _kernels, "step": _step, "picture": _picture, "memory": _memory, "cold": _cold,
}  # fmt: skip
