"""`octavo info`: what a model file is, what is inside, and how it is best used; or what this machine can do.

Files are told from headers, in a moment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.errors import RequestError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from octavo.checkpoint.describe import Description, PartDescription
    from octavo.checkpoint.presets import Preset


def info(
    model: Annotated[
        str | None, typer.Argument(help="A file or diffusers folder: a path, or a name in the models tree.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Tell what a device can do: cpu, cuda; the fastest if no name follows.", metavar="[NAME]"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the products, with --device; what suits it if unsaid.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time the ways to multiply, with --device.")] = False,
    models_dir: Annotated[
        str | None, typer.Option(envvar="OCTAVO_MODELS", help="Folder laid out as ComfyUI's models/.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a model file is: parts, bytes by dtype, layers in FP8, recommended settings. Or what a device can."""
    if device is not None:
        _tell_device(device, dtype, measure, as_json)
        if model is None:
            return
    if model is None:
        raise RequestError("Say which model to tell about: octavo info NAME. Of this machine: octavo info --device.")
    from octavo.checkpoint.describe import describe
    from octavo.checkpoint.folders import Folders

    path = Path(model).expanduser()
    description = describe(path if path.exists() else Folders.standard(models_dir).find(model))
    if as_json:
        print(json.dumps(description.as_json(), indent=1))
        return
    from rich.console import Console, Group

    here = _placed_here(str(path) if path.exists() else model, models_dir) if description.preset else []
    Console().print(Group(*_page(description), *here), highlight=False)


def _placed_here(model: str, models_dir: str | None) -> list[RenderableType]:
    """Where the model's parts would be on this machine's GPU, if it has one."""
    from rich.text import Text

    from octavo.devices import pick_device
    from octavo.errors import OctavoError

    if pick_device().type != "cuda":
        return []
    from octavo.pipeline.assemble import load

    try:
        components = load(model, models_dir=models_dir)
    except OctavoError as error:  # of a file alone, without encoders, there is no more to tell
        return [Text(f"Memory here: no plan, for the model is not complete. {error}")]
    return [Text(f"Memory here: {components.placing}")]


def _tell_device(name: str, dtype: str | None, measure: bool, as_json: bool) -> None:
    from rich.console import Console, Group

    from octavo.cli.device import as_json as to_json
    from octavo.cli.device import attention_page, machine, page
    from octavo.devices import pick_device, pick_dtype
    from octavo.fp8 import survey
    from octavo.placement.survey import survey_attention

    chosen = pick_device(name)
    computes = pick_dtype(dtype, chosen)
    facts, findings = machine(chosen), survey(chosen, computes, measure=measure)
    ways = survey_attention(chosen, computes, measure=measure)
    if as_json:
        print(json.dumps(to_json(facts, findings, ways), indent=1))
    else:
        Console().print(Group(*page(facts, findings), *attention_page(facts, ways)), highlight=False)


def _page(description: Description) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    from octavo.checkpoint.kinds import TITLES

    lines: list[RenderableType] = [
        Text.assemble((description.what, "bold"), f"  {description.path}  {human(description.nbytes)}")
    ]
    if description.domain:
        lines.append(Text(description.domain))
    table = Table("part", "weights", "bytes", "kept as", "linears in FP8", box=None, pad_edge=False, header_style="dim")
    for part in description.parts:
        table.add_row(
            Text(part.what),
            f"{part.parameters / 1e6:,.1f} M" if part.parameters is not None else "",
            human(part.nbytes),
            ", ".join(f"{dtype} {human(nbytes)}" for dtype, nbytes in part.bytes_by_dtype.items()),
            f"{part.fp8_layers} of {part.linear_layers}" if part.linear_layers else "",
        )
    lines += ["", table, ""]
    lines += [Text(f"FP8 in the {TITLES[part.kind]}: {_fp8(part)}") for part in description.parts if part.fp8_form]
    if description.other_tensors:
        lines.append(
            f"{description.other_tensors} other tensors, {human(description.other_bytes)}, are of no use here."
        )
    if description.needs:
        lines.append(f"Needs beside it: {' and '.join(description.needs)}.")
    if description.preset:
        lines.append(Text(f"Recommended: {_settings(description.preset)}"))
    return lines


def _fp8(part: PartDescription) -> str:
    notes = [part.fp8_form or ""]
    if part.fp8_rowwise:
        notes.append(f"{part.fp8_rowwise} layers scaled by row")
    if part.fp8_input_scales:
        notes.append(f"{part.fp8_input_scales} with an input scale")
    if part.fp8_full_precision:
        notes.append(f"{part.fp8_full_precision} to be multiplied in full precision")
    return "; ".join(notes)


def _settings(preset: Preset) -> str:
    guidance = preset.skip_layer_guidance
    skipping = f" --slg {guidance.scale:g}" if guidance else ""
    return (
        f"--size {preset.width}x{preset.height} --steps {preset.steps} --guidance {preset.guidance_scale:g} "
        f"--sampler {preset.sampler} --schedule {preset.schedule} --shift {preset.shift:g}{skipping}"
    )


def human(nbytes: int) -> str:
    """Bytes as people read them, in powers of ten as on the hub."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.{1 if nbytes < 10 * size else 0}f} {unit}"
    return f"{nbytes} B"
