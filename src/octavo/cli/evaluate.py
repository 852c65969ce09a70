"""`octavo evaluate`: models side by side by the same prompts and seeds, and a report of what tells them apart."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli import memory
from octavo.cli.generate import parse_size
from octavo.cli.threads import Threads
from octavo.errors import MissingExtraError, RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.evaluate.columns import Column
    from octavo.evaluate.comparison import Comparison, Options
    from octavo.evaluate.drawn import Drawn, Watch
    from octavo.evaluate.features import FeatureNetwork, PerceptualDistance
    from octavo.evaluate.prompt_set import Prompt
    from octavo.evaluate.typography import TextReader

EPILOG = """[bold]Examples[/]

octavo evaluate sd3.5_medium best.safetensors --pictures 128 --clip openai/clip-vit-large-patch14 --report out/

octavo evaluate embedded octavo-demo-fp8 octavo-demo-fp8@plain-w8a8 --report out/

octavo evaluate 16-bit=sd3.5_large FP8=sd3.5_large@force-fp8+fast --prompts prompts.txt --steps 28 --report out/

The first model is the reference. Behind @ stands how FP8 is multiplied: a backend's name, fast, force-fp8, joined by +.

A run that was stopped is finished by repeating it.
"""

Clip = Annotated[
    str | None,
    typer.Option(help="CLIP for scores, FID and CMMD: a folder, or a name on the hub. Without, the embedded judge."),
]
Lpips = Annotated[
    Path | None, typer.Option(help="Folder with AlexNet's and LPIPS's weights. Without, the judge's distance.")
]
Ocr = Annotated[
    bool | None,
    typer.Option("--ocr/--no-ocr", help="Read the words that prompts ask for; if unsaid, where the reader is there."),
]
ReferenceFolder = Annotated[
    Path | None, typer.Option("--reference", help="Folder of pictures that FID and CMMD are counted against.")
]
PromptSource = Annotated[str | None, typer.Option(help="Text file with one prompt a line, or 'builtin'.")]
Report = Annotated[Path, typer.Option("--report", "-o", help="Folder of the report, its pictures included.")]
Restart = Annotated[bool, typer.Option("--restart", help="Draw anew what an earlier run left in the folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the report's path.")]


def evaluate(
    models: Annotated[list[str], typer.Argument(help="NAME=MODEL@HOW; NAME= and @HOW may be left out.")],
    report: Report,
    prompts: PromptSource = "builtin",
    pictures: Annotated[
        int | None, typer.Option("--pictures", "-p", min=1, help="How many; prompts come again with other seeds.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture; the next ones count up.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler; as suits the first model if unsaid.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", "-g", help="Guidance scale (CFG).")] = None,
    size: Annotated[str | None, typer.Option("--size", "-s", help="Width x height in pixels.")] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, dpmpp_2m, …")] = None,
    schedule: Annotated[str | None, typer.Option(help="simple, sgm_uniform, …")] = None,
    shift: Annotated[float | None, typer.Option(help="Shift of the schedule.")] = None,
    clip: Clip = None,
    lpips: Lpips = None,
    ocr: Ocr = None,
    reference: ReferenceFolder = None,
    velocity_prompts: Annotated[
        int, typer.Option(min=0, help="Prompts whose velocity is compared by step and layer; 0 leaves it out.")
    ] = 4,
    other_seeds: Annotated[
        bool, typer.Option("--other-seeds", help="Let the first model draw twice, to show what chance alone does.")
    ] = False,
    restart: Restart = False,
    text_encoder: Annotated[
        list[str] | None, typer.Option(help="Encoder to use instead of those found with the models; may be repeated.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="VAE to use instead of those found with the models.")] = None,
    models_dir: Annotated[
        Path | None, typer.Option(envvar="OCTAVO_MODELS", help="Folder laid out as ComfyUI's models/.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the fastest if unsaid.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; what suits the device.")] = None,
    threads: Threads = None,
    vram: memory.Vram = None,
    quiet: Quiet = False,
) -> None:
    """Compare models by the same prompts and seeds, and write a report."""
    from octavo.evaluate.columns import ModelColumn, parse_column
    from octavo.evaluate.comparison import Options
    from octavo.evaluate.metrics import require_torchmetrics
    from octavo.placement.threads import is_large, take_threads

    console = _console(quiet)
    require_torchmetrics()
    loading = {
        "models_dir": models_dir, "text_encoders": text_encoder or (), "vae": vae, "device": device, "dtype": dtype,
        "vram": memory.allowed(vram, device),
    }  # fmt: skip
    columns = [parse_column(model, **loading) for model in models]
    first = columns[0]
    if not isinstance(first, ModelColumn):
        raise RequestError("The first column is the reference and must be a model; 'octavo compare' takes folders.")
    components = first.load()
    take_threads(threads, components.device, measure=is_large(components.mmdit.skeleton))
    asked = _prompts(prompts, pictures, embedded=components.embedded)
    settings = {
        "steps": steps, "guidance_scale": guidance, "sampler": sampler, "schedule": schedule, "shift": shift,
        **parse_size(size),
    }  # fmt: skip
    network, distance = judges(clip, lpips, device)
    options = Options(
        settings={key: value for key, value in settings.items() if value is not None},
        seed=seed,
        network=network,
        distance=distance,
        reader=reader_for(asked, ocr, console),
        reference_folder=reference,
        velocity_prompts=velocity_prompts,
        other_seeds=other_seeds,
        restart=restart,
    )
    run(console, columns, asked, report, options)


def run(
    console: Console, columns: Sequence[Column | Drawn], prompts: Sequence[Prompt], report: Path, options: Options
) -> None:
    """Compare, show the table's main lines, and print the report's path."""
    from octavo.evaluate.comparison import compare
    from octavo.evaluate.report import write_report

    with _progress(console) as watch:
        command = shlex.join(["octavo", *sys.argv[1:]])
        comparison = compare(columns, prompts, out=report, options=options, command=command, watch=watch)
    page, *_ = write_report(comparison, report)
    _summary(console, comparison)
    print(page)


def judges(
    clip: str | None, lpips: Path | None, device: str | None
) -> tuple[FeatureNetwork | None, PerceptualDistance | None]:
    """The networks that were asked for; None for the embedded judge."""
    network: FeatureNetwork | None = None
    distance: PerceptualDistance | None = None
    if clip is not None:
        from octavo.devices import pick_device
        from octavo.evaluate.features import ClipNetwork

        network = ClipNetwork(clip, pick_device(device))
    if lpips is not None:
        from octavo.evaluate.lpips import load_lpips

        distance = load_lpips(lpips)
    return network, distance


def reader_for(prompts: Sequence[Prompt], ocr: bool | None, console: Console) -> TextReader | None:
    """A reader of text, where a prompt asks for words that the checker cannot read."""
    if ocr is False or not any(prompt.words and prompt.scene is None for prompt in prompts):
        return None
    from octavo.evaluate.typography import RapidReader

    try:
        return RapidReader()
    except MissingExtraError as missing:
        if ocr:
            raise
        console.print(f"{missing} The score is left out.", style="yellow", markup=False)
        return None


def _prompts(source: str | None, count: int | None, *, embedded: bool) -> list[Prompt]:
    from octavo.evaluate.prompt_set import builtin_prompts, read_prompts

    if source in (None, "builtin"):
        return builtin_prompts(count, embedded=embedded)
    return read_prompts(Path(str(source)), count)


def _console(quiet: bool) -> Console:
    from rich.console import Console

    return Console(stderr=True, quiet=quiet, highlight=False)


def _summary(console: Console, comparison: Comparison) -> None:
    """The table of the report, without its notes."""
    from rich.table import Table
    from rich.text import Text

    from octavo.evaluate.table import groups_of

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in comparison.columns:
        table.add_column(Text(column.drawn.name), justify="right")
    for group in groups_of(comparison.to_json()):
        table.add_row(Text(group.title, style="dim"))
        for line in group.lines:
            cells = [f"{cell.value}  {cell.difference}" if cell.difference else cell.value for cell in line.cells]
            table.add_row(Text(line.title), *map(Text, cells))
    console.print(table)


@contextmanager
def _progress(console: Console) -> Iterator[Watch]:
    """A bar for what is done to one column at a time, with the time left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    words = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*words, *times, console=console, disable=console.quiet) as bar:
        tasks: dict[tuple[str, str], Any] = {}

        def watch(column: str, stage: str, done: int, total: int) -> None:
            key = (column, stage)
            if key not in tasks:
                tasks[key] = bar.add_task(f"{column}: {stage}", total=total)
            bar.update(tasks[key], completed=done, total=total)

        yield watch
