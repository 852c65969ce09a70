"""`octavo compare`: a report made before, beside pictures that other programs made of the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.evaluate import (
    Clip,
    Lpips,
    Ocr,
    PromptSource,
    Quiet,
    ReferenceFolder,
    Report,
    Restart,
    _console,
    _prompts,
    judges,
    reader_for,
    run,
)
from octavo.cli.generate import parse_size
from octavo.cli.threads import Threads
from octavo.errors import RequestError

if TYPE_CHECKING:
    from octavo.evaluate.columns import Column
    from octavo.evaluate.drawn import Drawn
    from octavo.evaluate.prompt_set import Prompt

EPILOG = """[bold]Examples[/]

octavo compare out/ FLUX.1-dev=flux-pictures/ Midjourney=mj/ --report compared/

octavo compare out/ SDXL-Turbo=diffusers:stabilityai/sdxl-turbo --steps 1 --guidance 0 --report compared/

A folder's pictures belong to the prompts by the numbers that end their names, from 1 on, or by a prompts.txt there.
"""


def compare(
    columns: Annotated[
        list[str],
        typer.Argument(help="Reports, folders of pictures, diffusers:PATH; NAME= may stand before."),
    ],
    report: Report,
    prompts: PromptSource = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the first picture a pipeline draws; the report's if unsaid.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of pipelines; as each of them likes if unsaid.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", "-g", help="Their guidance scale.")] = None,
    size: Annotated[str | None, typer.Option("--size", "-s", help="Their width x height in pixels.")] = None,
    clip: Clip = None,
    lpips: Lpips = None,
    ocr: Ocr = None,
    reference: ReferenceFolder = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the fastest if unsaid.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; what suits the device.")] = None,
    threads: Threads = None,
    restart: Restart = False,
    quiet: Quiet = False,
) -> None:
    """Put pictures made elsewhere beside those of a report."""
    from octavo.devices import pick_device
    from octavo.evaluate.columns import ModelColumn, parse_column
    from octavo.evaluate.comparison import Options, open_report
    from octavo.evaluate.drawn import matched
    from octavo.evaluate.metrics import require_torchmetrics
    from octavo.placement.threads import take_threads

    console = _console(quiet)
    require_torchmetrics()
    take_threads(threads, pick_device(device))
    asked: list[Prompt] = [] if prompts is None else _prompts(prompts, None, embedded=False)
    chosen: list[Column | Drawn] = []
    for text in columns:
        if not (Path(text) / "report.json").exists():
            column = parse_column(text, device=device, dtype=dtype)
            if isinstance(column, ModelColumn):
                raise RequestError(
                    f"'{text}' is no report, no folder of pictures and no diffusers:PATH. Models are drawn by "
                    "'octavo evaluate', which goes on from its earlier report."
                )
            chosen.append(column)
            continue
        theirs, drawn, told = open_report(Path(text))
        seed = int(told["seed"]) if seed is None else seed
        asked = asked or theirs
        chosen += matched(drawn, theirs, asked, same_reference=not chosen)
    if not asked:
        lists = [Path(text.rpartition("=")[2]) / "prompts.txt" for text in columns]
        listed = next((path for path in lists if path.exists()), None)
        if listed is None:
            raise RequestError("No column says which prompts its pictures show: give a report, or --prompts FILE.")
        asked = _prompts(str(listed), None, embedded=False)
    settings = {"steps": steps, "guidance_scale": guidance, **parse_size(size)}
    network, distance = judges(clip, lpips, device)
    options = Options(
        settings={key: value for key, value in settings.items() if value is not None},
        seed=seed or 0,
        network=network,
        distance=distance,
        reader=reader_for(asked, ocr, console),
        reference_folder=reference,
        velocity_prompts=0,
        restart=restart,
    )
    run(console, chosen, asked, report, options)
