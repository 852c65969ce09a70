"""`octavo quantize`: a 16-bit checkpoint becomes an FP8 one. The path goes to stdout, everything else to stderr."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.info import human
from octavo.cli.threads import Threads
from octavo.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.compress.files import Written
    from octavo.compress.progress import Progress as Report
    from octavo.compress.write import Summary
    from octavo.quantize import Sensitivity

EPILOG = """[bold]Examples[/]

octavo quantize sd3.5_medium.safetensors sd3.5_medium-fp8.safetensors

octavo quantize sd3.5_large.safetensors large-fp8.safetensors --format both --size 512x512

octavo quantize sd3.5_medium.safetensors quick.safetensors --recipe row

octavo quantize sd3.5_medium.safetensors careful.safetensors --keep-16bit 5% --min-psnr 30

octavo quantize my-finetune.safetensors mine-fp8.safetensors --prompts what-i-draw.txt --budget 3.2GB

octavo quantize sd3.5_large_controlnet_canny.safetensors canny-fp8.safetensors --model sd3.5_large

A job that was stopped goes on when the same command is given again. 'octavo recipes' shows the recipes.
"""
FILE, CALIBRATION, QUALITY, MODEL = "The file", "Calibration", "Quality", "Model"
SHOWN = 12  # most sensitive layers
PHASES = {
    "encode": "Encoding the prompts",
    "trajectories": "Drawing them, to see what the model sees",
    "sensitivity": "Measuring what each layer costs",
    "write": "Quantizing",
    "record": "Fine-tuning: what the 16-bit model answers",
    "judge": "Fine-tuning: how close the FP8 model is",
    "train": "Fine-tuning",
    "gate": "Drawing pictures to judge by",
}


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A 16-bit model or ControlNet: a path, or a name in the models tree.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, .safetensors.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A name that 'octavo recipes' shows, or a .toml file; best, or comfy for ComfyUI, if not given.",
            rich_help_panel=FILE,
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="octavo holds every recipe; comfyui is for both programs, one scale a matrix; both writes two files.",
            rich_help_panel=FILE,
        ),
    ] = "octavo",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Size that the file may have, such as 6.0GB: the layers that gain most stay in 16 bits.",
            rich_help_panel=FILE,
        ),
    ] = None,
    keep_16bit: Annotated[
        str | None,
        typer.Option(
            "--keep-16bit", help="The same as a share of the linear weights, such as 5%.", rich_help_panel=FILE
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT, and keep a file that fails its gate.", rich_help_panel=FILE)
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts to calibrate on, one a line; built-in ones if unsaid.", rich_help_panel=CALIBRATION),
    ] = None,
    calibration_size: Annotated[
        int, typer.Option(min=1, help="How many prompts to calibrate on.", rich_help_panel=CALIBRATION)
    ] = 128,
    steps: Annotated[
        int | None, typer.Option(help="Steps of each run; as suits the model if unsaid.", rich_help_panel=CALIBRATION)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", "-g", help="Guidance scale of the runs.", rich_help_panel=CALIBRATION)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", "-s", help="Width x height of the runs; less is faster.", rich_help_panel=CALIBRATION),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the runs.", rich_help_panel=CALIBRATION)] = 0,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            help="Sensitivity by layer (JSON): read if it is there, else measured and written.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    min_psnr: Annotated[
        float | None,
        typer.Option(
            help="dB from the 16-bit model's pictures that are asked for; below, no file is written.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    gate: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="How many pictures to judge by; 8 if a bound is set or the recipe calibrates.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    finetune: Annotated[
        int,
        typer.Option(
            min=0,
            help="Steps of training by the 16-bit model's answers, after the calibration; 0 is none.",
            rich_help_panel=QUALITY,
        ),
    ] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Of a ControlNet: the model that it steers, in FP8 if you like; for calibration and gate.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    text_encoder: Annotated[
        list[str] | None,
        typer.Option(help="Encoder to use instead of those found; may be repeated.", rich_help_panel=MODEL),
    ] = None,
    vae: Annotated[str | None, typer.Option(help="VAE to use instead of the one found.", rich_help_panel=MODEL)] = None,
    models_dir: Annotated[
        Path | None,
        typer.Option(envvar="OCTAVO_MODELS", help="Folder laid out as ComfyUI's models/.", rich_help_panel=MODEL),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; the fastest if unsaid.", rich_help_panel=MODEL)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the arithmetic: float32, bfloat16; as suits the device if unsaid.", rich_help_panel=MODEL
        ),
    ] = None,
    threads: Threads = None,
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory", help="Read the model block by block even where all of it fits.", rich_help_panel=MODEL
        ),
    ] = False,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for unfinished work, kept; else beside OUT, and removed.", rich_help_panel=MODEL),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the path.")] = False,
) -> None:
    """Make an FP8 file of a 16-bit model, calibrated on the model's own runs and judged by its pictures.

    Memory stays small whatever the model: weights are read, quantized and written block by block. Only what fits into
    free memory stays there. The file appears when it is complete and good enough.
    """
    from rich.console import Console

    from octavo.cli.generate import parse_size
    from octavo.compress.job import quantize_checkpoint
    from octavo.compress.settings import QuantizeSettings
    from octavo.devices import pick_device
    from octavo.placement.threads import take_threads

    console = Console(stderr=True, quiet=quiet, highlight=False)
    take_threads(threads, pick_device(device), measure=True, lean=True)
    settings = QuantizeSettings(
        recipe=recipe,
        form=form,  # type: ignore[arg-type]  # checked there
        prompts=prompts,
        calibration_size=calibration_size,
        steps=steps,
        guidance_scale=guidance,
        seed=seed,
        model=model,
        text_encoders=tuple(text_encoder or ()),
        vae=vae,
        models_dir=models_dir,
        device=device,
        dtype=dtype,
        budget=_bytes(budget),
        keep_16bit=_share(keep_16bit),
        sensitivity=sensitivity,
        min_psnr=min_psnr,
        gate=gate,
        finetune=finetune,
        low_memory=low_memory,
        work=work,
        force=force,
        **parse_size(size),
    )
    with _progress(console) as watch:
        summary = quantize_checkpoint(source, out.expanduser(), settings, watch=watch)
    if summary.sensitivity is not None:
        console.print(_sensitive(summary.sensitivity, summary.files[0]))
    for line in _lines(summary):
        console.print(line, soft_wrap=True, markup=False)
    for file in summary.files:
        print(file.path)


def _lines(summary: Summary) -> Iterator[str]:
    """The summary in words."""
    for file in summary.files:
        yield (
            f"{file.path.name} ({file.form}, recipe {file.recipe.name}): {human(summary.source_bytes)} → "
            f"{human(file.nbytes)}, {file.fp8_weights / file.linear_weights:.1%} of the linear weights in FP8"
        )
        if file.kept:
            more = f" and {len(file.kept) - SHOWN} more" if len(file.kept) > SHOWN else ""
            yield f"  in 16 bits: {', '.join(file.kept[:SHOWN])}{more}"
        yield f"  {file.verdict}"
    if summary.finetuned is not None:
        made = str(summary.finetuned).replace(summary.finetuned.out.name, summary.files[0].path.name)
        yield f"fine-tuning {made}"
    again = ", going on with what an earlier run had done" if summary.resumed else ""
    yield f"{_duration(summary.seconds)}{again}"


def _sensitive(sensitivity: Sensitivity, file: Written) -> Any:
    from rich.table import Table

    table = Table("most sensitive layers", "weights", "error alone", "kept", box=None, pad_edge=False)
    for name in sensitivity.ranked()[:SHOWN]:
        kept = "16 bits" if name in file.kept else ""
        table.add_row(name, f"{sensitivity.weights[name]:,}", f"{sensitivity.errors[name]:.2e}", kept)
    return table


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[Report], None]]:
    """A bar for each phase."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[of]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=console.quiet) as bar:
        tasks: dict[str, TaskID] = {}

        def watch(report: Report) -> None:
            show = human if report.phase == "write" else str
            of = f"{show(report.done)} of {show(report.total)}"
            if report.phase not in tasks:
                tasks[report.phase] = bar.add_task(PHASES[report.phase], total=report.total, of=of)
            bar.update(tasks[report.phase], total=report.total, completed=report.done, of=of)

        yield watch


def _bytes(given: str | None) -> int | None:
    """Bytes; units are powers of ten, as on the hub."""
    if given is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", given.strip().upper())
    if match is None:
        raise RequestError(f"--budget {given}: write the size of a file, such as 6.0GB or 900MB.")
    return int(float(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]])


def _share(given: str | None) -> float | None:
    if given is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", given.strip())
    if match is None or float(match[1]) > 100:
        raise RequestError(f"--keep-16bit {given}: write a share of the weights in percent, such as 5%.")
    return float(match[1]) / 100


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
