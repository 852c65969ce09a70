"""`octavo bench`: how fast this machine draws, and how near that is to what it could."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.generate import parse_size
from octavo.cli.threads import Threads

if TYPE_CHECKING:
    from octavo.evaluate.bench_results import Results

EPILOG = """[bold]Examples[/]

octavo bench

octavo bench --suite step --model large --device cuda --peers

octavo bench --suite ceilings --suite kernels --model medium --size 512x512

octavo bench --suite all --model large --seconds 300 --out runs/bench/large

Random weights of the released shapes are made on the device; nothing is downloaded.
"""


def bench(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            help="ceilings, kernels, step, picture, memory, cold, or all; may be repeated. Step and picture if unsaid.",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="embedded; large or medium, with random weights; a name or path.")
    ] = "embedded",
    size: Annotated[str | None, typer.Option("--size", "-s", help="Width x height in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of pictures.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of a step; 2 is one picture with guidance.")] = 2,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Begin nothing new after this long.")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Run diffusers and torchao in the same turns.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Measure a compiled step, too.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.svg.")] = Path("runs/bench/octavo"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the fastest if unsaid.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; what suits the device.")] = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON file instead of the table.")] = False,
) -> None:
    """Measure speed and memory, each time beside its share of what the device could do."""
    from rich.console import Console

    from octavo.devices import pick_device, pick_dtype
    from octavo.evaluate.bench import JSON, SUITES, Options, run
    from octavo.placement.threads import take_threads

    chosen = pick_device(device)
    take_threads(threads, chosen, measure=model != "embedded")  # as what is measured does
    sides = parse_size(size)
    options = Options(
        model=model,
        suites=SUITES if suite and "all" in suite else tuple(suite or ("ceilings", "step", "picture")),
        device=chosen,
        dtype=pick_dtype(dtype, chosen),
        width=sides.get("width"),
        height=sides.get("height"),
        steps=steps,
        batch=batch,
        repeats=repeats,
        seconds=float("inf") if seconds is None else seconds,
        peers=peers,
        compile=compile,
        out=out,
    )
    console = Console(stderr=True)
    results = run(options, command=" ".join(["octavo", *sys.argv[1:]]), tell=lambda name: console.print(f"{name} …"))
    if as_json:
        print((out / JSON).read_text("utf-8"), end="")
    else:
        _show(results)
    console.print(f"{out / JSON}", soft_wrap=True, highlight=False)


def _show(results: Results) -> None:
    """A line each, in columns as wide as they must be: a terminal may cut them, a file gets them whole."""
    from octavo.evaluate.bench_plot import human

    rows = [("what", "median", "p95", "of the ceiling")]
    for line in results.lines:
        share = f"{line['fraction']:.0%}" if "fraction" in line else ""
        rows.append((line["name"], human(line["median"], line["unit"]), human(line["p95"], line["unit"]), share))
    wide, middle, high, last = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, median, p95, share in rows:
        print(f"{name:{wide}}  {median:>{middle}}  {p95:>{high}}  {share:>{last}}".rstrip())
    for entry in results.absent:
        print(f"not measured: {entry['name']}: {entry['reason']}")
    for entry in results.errors:
        print(f"failed: {entry['name']}: {entry['error'].splitlines()[0]:.200}")
