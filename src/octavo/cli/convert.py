"""`octavo convert`: a model from single file to diffusers folder and back, 16-bit or FP8, without loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from octavo.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    import torch

    from octavo.checkpoint.convert import Conversion
    from octavo.checkpoint.kinds import Kind

EPILOG = """Examples:

octavo convert sd3.5_medium.safetensors my-folder

octavo convert my-folder medium.safetensors --parts mmdit,vae

octavo convert sd3.5_medium.safetensors medium-bare.safetensors --parts mmdit --bare --dtype float16
"""
PARTS: dict[str, Kind] = {
    "mmdit": "mmdit", "transformer": "mmdit", "clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5", "t5xxl": "t5",
    "vae": "vae",
}  # fmt: skip
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A file, an index of shards or a diffusers folder; or a model's name.")
    ],
    to: Annotated[
        Path, typer.Argument(metavar="OUT", help="A file, if the name ends on .safetensors; else a diffusers folder.")
    ],
    parts: Annotated[
        str | None,
        typer.Option(help="What to write: mmdit, clip_l, clip_g, t5, vae, with commas between; all if not given."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32 for all that is not FP8; as it is if not given.")
    ] = None,
    bare: Annotated[
        bool, typer.Option("--bare", help="To a file of one part: names without prefix, as in diffusion_models/.")
    ] = False,
    fp8_form: Annotated[
        str | None, typer.Option(help="To a file: comfyui or octavo; ComfyUI's wherever it can say all, if not given.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="To a folder: largest file of weights, such as 5GB; 10GB if not given.")
    ] = None,
    models_dir: Annotated[
        str | None, typer.Option(envvar="OCTAVO_MODELS", help="Folder laid out as ComfyUI's models/.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes; just the place.")] = False,
) -> None:
    """Convert a model between single file and diffusers folder, FP8 or 16-bit, without loss.

    Nothing appears at OUT until all of it is written. Memory stays at a few megabytes, whatever the model.
    """
    kinds, form, shard_bytes = _parts(parts), _form(fp8_form), _size(max_shard_size)
    wanted = dtype_called(dtype)

    from octavo.checkpoint.convert import Wishes, plan_conversion
    from octavo.checkpoint.folders import Folders
    from octavo.checkpoint.source import open_source

    path = Path(source).expanduser()
    place = to.expanduser()
    wishes = Wishes(parts=kinds, dtype=wanted, bare=bare, form=form, shard_bytes=shard_bytes, force=force)
    with open_source(path if path.exists() else Folders.standard(models_dir).find(source)) as opened:
        conversion = plan_conversion(opened, place, wishes)
        if quiet:
            conversion.run()
        else:
            for note in conversion.notes:
                typer.echo(note, err=True)
            _run_with_progress(conversion)
    typer.echo(place)


def _run_with_progress(conversion: Conversion) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(conversion.to.name, total=conversion.nbytes)
        conversion.run(lambda nbytes: bar.advance(task, nbytes))


def _parts(given: str | None) -> tuple[Kind, ...] | None:
    if given is None:
        return None
    names = [name.strip().lower() for name in given.split(",")]
    for name in names:
        if name not in PARTS:
            raise RequestError(f"There is no part '{name}'. Parts are {', '.join(PARTS)}.{did_you_mean(name, PARTS)}")
    return tuple(PARTS[name] for name in names)


def _form(given: str | None) -> Literal["comfyui", "octavo"] | None:
    if given not in (None, "comfyui", "octavo"):
        raise RequestError(f"There is no FP8 form '{given}'. Use comfyui or octavo, or leave it out.")
    return cast("Literal['comfyui', 'octavo'] | None", given)


def _size(given: str | None) -> int | None:
    """Bytes; units are powers of ten, as on the hub."""
    if given is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", given.strip().upper())
    nbytes = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if nbytes < 1:
        raise RequestError(f"'{given}' is not the size of a file. Write it as 5GB or 500MB.")
    return nbytes


def dtype_called(given: str | None) -> torch.dtype | None:
    """The dtype of this name; None where none is given."""
    if given is None:
        return None
    from octavo.devices import DTYPES

    if given not in DTYPES:
        raise RequestError(f"There is no dtype '{given}'. Use {', '.join(DTYPES)}.{did_you_mean(given, DTYPES)}")
    return DTYPES[given]
