"""What an H200 should take, by the names that the measured run gives its figures; nothing here is measured.

    python -m benchmarks.predict_aims                # writes docs/benchmarks/predicted_aims.json

Ours come from the simulated card of `octavo plan`, resident and under budgets, with exact attention and, as `--fast`
has it, in eight bits. Peers come from the same rates, for a peer is only as slow as what it does: diffusers' passes
over memory and kernels as `benchmarks.peer_passes` counts them, its modulation made anew at each step. So a peer's
seconds are a bound from below; those published for an H100 are about twice as many. `ASSUMED` says what is no more than
that. Shares of a ceiling are not here, since the shares that products and attention reach are what the simulation
starts from. `benchmarks.gpu` prints what it measures beside these.
"""

import argparse
import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from benchmarks.peer_passes import STORED as PEER_PASSES
from benchmarks.predict import MODELS, WORK
from benchmarks.predicted import STORED
from octavo._version import __version__
from octavo.checkpoint.skeletons import Format, skeletons
from octavo.models.mmdit import MMDiTConfig
from octavo.placement import costs
from octavo.placement.cards import CARDS
from octavo.placement.costs import Cost
from octavo.placement.plan import make_plan
from octavo.placement.schedule import run
from octavo.placement.shapes import Shapes

CARD = CARDS["h200"]
BUDGETS = {"large": {"fp8_6.5GB": 6_500_000_000, "fp8_3GB": 3 * 10**9}, "medium": {"fp8_3GB": 3 * 10**9}}

LAUNCH = 7e-6  # seconds for which Python and torch are busy with a kernel of eager code
PAGE_CACHE = 10e9  # bytes/s by which several threads read a cached file into pinned memory
IMPORT = 1.15  # seconds: measured on a CPU (docs/benchmarks.md)
START = {"python": 0.05, "context": 2.0, "headers": 0.1, "first_use": 2.0}  # seconds
ASSUMED: Mapping[str, str] = {
    "rates": CARD.source,
    "attention": f"{costs.ATTENTION} of the 16-bit rate; with --fast {costs.ATTENTION_8BIT} of the FP8 rate",
    "products": "at the card's rate, every shape of them",
    "own kernels": "launches hidden by CUDA graphs; each pass moves its bytes once at the card's bandwidth",
    "diffusers": f"eager code waits {LAUNCH * 1e6:g} us a kernel for the host, where the device's work is not longer",
    "torchao": "products at the FP8 rate but for modulation and embedders, in bfloat16; compiled, its passes are as "
    "few as ours, and launches cost nothing",
    "peers' encoders and VAE": "as fast as ours in 16 bits, everything on the device",
    "cold": f"the file in the page cache, read at {PAGE_CACHE / 1e9:g} GB/s; import {IMPORT} s, as measured on a CPU; "
    f"torch's CUDA libraries and the device's context {START['context']} s; first use of kernels that an earlier "
    f"process has compiled {START['first_use']} s",
}
# As docs/benchmarks.md has them.
AIMS: Mapping[str, float] = {
    "picture.large.fp8.whole": 1.6,
    "picture.large.fp8_over_bfloat16": 1 / 1.67,
    "picture.large.fp8_over_diffusers": 1 / 2.3,
    "picture.large.fp8_over_diffusers_torchao_fp8_compiled": 1 / 1.15,
    "cold.large.whole": 15.0,
    "memory.large.fp8_6.5GB": 6.5e9,
    "memory.large.fp8_3GB": 3e9,
    "memory.large.fp8_3GB.denoise_over_resident": 1.1,
}
OURS: Mapping[str, tuple[Format, bool]] = {
    "bfloat16": ("bf16", False),
    "fp8": ("fp8", False),
    "fp8_fast": ("fp8", True),
}
PEERS = ("diffusers", "diffusers_torchao_fp8_compiled")


def figures() -> dict[str, float]:
    """Seconds, bytes and ratios by the names of `octavo bench`."""
    found: dict[str, float] = {}
    counted = json.loads(PEER_PASSES.read_text("utf-8"))
    for model in MODELS:
        shapes = {fmt: Shapes.of(skeletons(model, fmt)) for fmt in ("bf16", "fp8")}
        for name, (fmt, fast) in OURS.items():
            found |= _picture(f"{model}.{name}", _stages(shapes[fmt], fast))
        stages = _stages(shapes["bf16"], fast=False)
        for name in PEERS:
            step = _peer_step(shapes["bf16"], counted[model], compiled=name != "diffusers")
            found |= _picture(f"{model}.{name}", stages | {"modulation": 0.0, "denoise": WORK.steps * step})
        for kind in ("step", "picture"):
            found |= dict(_ratios(found, kind, model))
        for name, budget in BUDGETS[model].items():
            plan = make_plan(shapes["fp8"], budget, CARD, work=WORK)
            resident = found[f"picture.{model}.fp8.denoise"]
            found[f"memory.{model}.{name}"] = float(plan.peak)
            denoise = sum(plan.stages[stage].seconds or 0.0 for stage in ("modulation", "denoise"))
            found[f"memory.{model}.{name}.denoise"] = denoise
            found[f"memory.{model}.{name}.denoise_over_resident"] = denoise / resident
        found |= _cold(model, shapes["fp8"], found)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _stages(shapes: Shapes, fast: bool) -> dict[str, float]:
    plan = make_plan(shapes, CARD.usable, CARD, work=WORK)
    assert not plan.streamed, "an H200 has room for all"
    timeline = run(shapes, WORK, plan.parts, modulation_streamed=False, tile=None, card=CARD, fast=fast)
    return timeline.seconds


def _picture(name: str, stages: Mapping[str, float]) -> dict[str, float]:
    """Figures of a step and of a picture's stages; modulation counts as denoising, as when it is measured."""
    parts = {
        "encode": stages["encode"],
        "denoise": stages["modulation"] + stages["denoise"],
        "decode": stages["decode"],
        "whole": sum(stages.values()),
    }
    return {
        f"step.{name}": stages["denoise"] / WORK.steps,
        **{f"picture.{name}.{stage}": seconds for stage, seconds in parts.items()},
    }


def _peer_step(shapes: Shapes, counted: Mapping[str, int], *, compiled: bool) -> float:
    """One step of diffusers' transformer.

    Args:
        shapes: in 16 bits.
        counted: its kernels and the bytes that those move which are no products, as it comes.
        compiled: by torch.compile, with torchao's FP8 products by row.
    """
    part = shapes.parts["mmdit"]
    config = cast(MMDiTConfig, part.config)
    cost = costs.mmdit_ends(config, WORK)
    for i in range(config.depth):
        cost += costs.mmdit_block(config, i, WORK, part, passes="8 bits")
    if not compiled:
        cost = cost._replace(moved=float(counted["moved"]))
    modulation = Cost(weights=float(sum(part.modulation)))  # a row for each picture: reading the weights is all
    device = cost.seconds(CARD, fp8=compiled) + modulation.seconds(CARD, fp8=False)
    return device if compiled else max(device, LAUNCH * counted["kernels"])


def _ratios(found: Mapping[str, float], kind: str, model: str) -> Iterator[tuple[str, float]]:
    end = ".whole" if kind == "picture" else ""
    for ours in ("fp8", "fp8_fast"):
        for other in ("bfloat16", *PEERS):
            yield (
                f"{kind}.{model}.{ours}_over_{other}",
                found[f"{kind}.{model}.{ours}{end}"] / found[f"{kind}.{model}.{other}{end}"],
            )


def _cold(model: str, shapes: Shapes, found: Mapping[str, float]) -> dict[str, float]:
    """A first picture of a fresh process, stage by stage as `evaluate.bench_cold` has them."""
    picture, step = f"picture.{model}.fp8", found[f"step.{model}.fp8"]
    stages = {
        "python": START["python"],
        "import": IMPORT,
        "headers": START["context"] + START["headers"],
        # What is read goes on to the device while the next piece is read.
        "load": max(shapes.nbytes / PAGE_CACHE, shapes.nbytes / CARD.link),
        "encode": found[f"{picture}.encode"],
        "first_step": START["first_use"] + step,
        "other_steps": found[f"{picture}.denoise"] - step,
        "decode": found[f"{picture}.decode"],
    }
    whole = {"whole": sum(stages.values())}
    return {f"cold.{model}.{stage}": seconds for stage, seconds in (stages | whole).items()}


def page() -> dict[str, Any]:
    """All of it, as it is stored."""
    return {
        "predicted": True,
        "about": "By a simulated NVIDIA H200; nothing here was measured. Names are those of octavo bench; seconds, "
        "bytes of memory, ratios of seconds.",
        "command": "python -m benchmarks.predict_aims",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "version": __version__,
        "card": CARD.name,
        "work": f"{WORK.width}x{WORK.height}, {WORK.steps} steps, {WORK.rows} rows, {WORK.tokens} text tokens",
        "assumed": dict(ASSUMED),
        "aims": {name: float(f"{value:.4g}") for name, value in AIMS.items()},
        "figures": figures(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=STORED, help="file of the predictions")
    options = parser.parse_args()
    told = page()
    options.out.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for name, aim in AIMS.items():
        value = told["figures"][name]
        verdict = "predicted to be kept" if value <= aim else "predicted to be MISSED"
        print(json.dumps({"name": name, "aim": float(f"{aim:.4g}"), "predicted": value, "verdict": verdict}))


if __name__ == "__main__":
    main()
