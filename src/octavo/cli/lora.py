"""`octavo lora info`: what a LoRA file holds; `octavo lora merge`: LoRAs made part of a model's weights."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.convert import dtype_called
from octavo.errors import RequestError

if TYPE_CHECKING:
    from octavo.checkpoint.lora_merge import Merge
    from octavo.pipeline.loras import Loras

lora = typer.Typer(help="Look at LoRA files, and merge them into models.", no_args_is_help=True)

EPILOG = """[bold]Examples[/]

octavo lora merge sd3.5_medium style.safetensors:0.8 medium-style.safetensors

octavo lora merge sd3.5_large_fp8_scaled style:0.8 hands:0.5 large-style.safetensors --recipe row
"""


@lora.callback()
def _group() -> None:
    """Look at LoRA files, and merge them into models."""


@lora.command()
def info(
    file: Annotated[str, typer.Argument(help="A LoRA file, or its name in models/loras.")],
    models_dir: Annotated[
        Path | None, typer.Option(envvar="OCTAVO_MODELS", help="Folder laid out as ComfyUI's models/.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Tell which layers a LoRA changes, in which way, and at which rank; only its header is read."""
    from octavo.checkpoint.kinds import TITLES
    from octavo.checkpoint.lora_info import describe_lora

    found = describe_lora(_loras(models_dir).find(file))
    if as_json:
        fields = {name: getattr(found, name) for name in found.__dataclass_fields__} | {"path": str(found.path)}
        typer.echo(json.dumps(fields, indent=2))
        return
    kinds = ", ".join(f"{count} × {kind}" for kind, count in found.kinds.items())
    ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in found.ranks.items())
    typer.echo(f"{found.path}: {found.nbytes:,} bytes, {' and '.join(found.dtypes)}")
    for kind, count in found.parts.items():
        typer.echo(f"changes {count} layers of the {TITLES[kind]}")
    typer.echo(f"by {kinds}" + (f"; ranks {ranks}" if ranks else ""))
    if layers:
        for name, said in found.layers.items():
            typer.echo(f"  {name}: {said}")
    for key, value in found.metadata.items():
        typer.echo(f"{key}: {value[:200]}{' …' if len(value) > 200 else ''}")


@lora.command(epilog=EPILOG)
def merge(
    model: Annotated[str, typer.Argument(help="A model's file, folder or name.")],
    names: Annotated[
        list[str], typer.Argument(metavar="LORA[:STRENGTH]... OUT", help="LoRAs, then the .safetensors file to write.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(help="Quantize the merged model by this recipe, such as row or best; see 'octavo recipes'."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32 for what changes; the file's own, or bfloat16 from FP8."),
    ] = None,
    models_dir: Annotated[
        Path | None, typer.Option(envvar="OCTAVO_MODELS", help="Folder laid out as ComfyUI's models/.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes; just the place.")] = False,
) -> None:
    """Write a model with LoRAs in its weights, one layer in memory at a time.

    The result is in 16 bits unless a recipe is given. To draw with a LoRA this is not needed: see --lora of 'octavo
    generate', which changes no weight.
    """
    if len(names) < 2:
        raise RequestError("Name the LoRAs and the file to write: octavo lora merge MODEL LORA:0.8 OUT.safetensors.")
    from octavo.checkpoint.folders import Folders
    from octavo.checkpoint.lora_merge import described, plan_merge
    from octavo.checkpoint.source import open_source
    from octavo.cli.generate import lora_called

    *given, last = names
    out, wanted = Path(last).expanduser(), dtype_called(dtype)
    if recipe is not None and out.exists() and not force:
        raise RequestError(f"'{out}' is there already. Choose another place, or replace it with --force.")
    files = _loras(models_dir)
    asked = [lora_called(text) for text in given]
    loras = [(files.find(each.name), each.strength) for each in asked]
    path = Path(model).expanduser()
    found = path if path.exists() else Folders.standard(models_dir).find(model)
    with tempfile.TemporaryDirectory(prefix=".octavo-merge-", dir=_parent(out)) as folder:
        to = out if recipe is None else Path(folder) / out.name
        with open_source(found) as source:
            planned = plan_merge(source, loras, to, dtype=wanted, force=force)
            if not quiet:
                typer.echo(f"Changing {described(planned.changed)}.", err=True)
            _run(planned, quiet=quiet)
        if recipe is not None:
            _quantize(to, out, recipe, models_dir, force)
    typer.echo(out)


def _parent(out: Path) -> Path:
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"Cannot write to '{out.parent}': {error.strerror}. Choose another place.") from error
    return out.absolute().parent


def _quantize(merged: Path, out: Path, recipe: str, models_dir: Path | None, force: bool) -> None:
    from octavo.compress.job import quantize_checkpoint
    from octavo.compress.settings import QuantizeSettings

    quantize_checkpoint(merged, out, QuantizeSettings(recipe=recipe, models_dir=models_dir, force=force))


def _run(planned: Merge, *, quiet: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, quiet=quiet), transient=True) as bar:
        task = bar.add_task(planned.to.name, total=planned.nbytes)
        planned.run(lambda nbytes: bar.advance(task, nbytes))


def _loras(models_dir: Path | None) -> Loras:
    from octavo.checkpoint.folders import Folders
    from octavo.pipeline.loras import Loras

    return Loras(Folders.standard(None if models_dir is None else os.fspath(models_dir)))
