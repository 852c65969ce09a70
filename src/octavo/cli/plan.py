"""`octavo plan`: how a model would live on a graphics card, how much memory and time a picture would take.

Nothing is loaded, and the card need not be here: bytes follow from shapes, times from a simulated device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from octavo.cli.generate import parse_size
from octavo.errors import PlacementError, RequestError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from octavo.checkpoint.presets import Preset
    from octavo.placement.cards import Card
    from octavo.placement.plan import Plan, Stay
    from octavo.placement.shapes import PartShape, Shapes
    from octavo.placement.work import Work

EPILOG = """[bold]Examples[/]

octavo plan --card rtx-4060-8gb

octavo plan --model medium --format bf16 --card all

octavo plan --model large --card rtx-4070-12gb --vram 6.5GB

octavo plan --model sd3.5_large_fp8_scaled.safetensors --vram 3GB --size 1344x768 --steps 40

octavo plan --card h200 --vram 3GB --batch 2 --json

Times are predictions of a simulated card, for a picture after the first; see docs/memory.md.
"""

EVERY = "all"


def plan(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="large, turbo, medium, sd3-medium; or a model's file, of which headers do."),
    ] = "large",
    vram: Annotated[
        str | None,
        typer.Option(help="Memory that may be used, such as 6GB, 6.5G, 3GiB or 80%; all of the card's if unsaid."),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(help="rtx-4070-12gb, l4-24gb, …, or 'all' for every known one; this machine's if unsaid."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", "-s", help="Width x height in pixels, such as 1024x768.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler; as suits the model if unsaid.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", "-g", help="Guidance scale (CFG); 1 switches it off: half the work.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Pictures drawn together.")] = 1,
    fmt: Annotated[
        str | None, typer.Option("--format", help="fp8 or bf16 weights; fp8 if unsaid, of a file what it has.")
    ] = None,
    models_dir: Annotated[
        str | None, typer.Option(envvar="OCTAVO_MODELS", help="Folder laid out as ComfyUI's models/.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say how a model would fit a graphics card, where each part would live, and how long a picture would take."""
    from rich.console import Console

    from octavo.placement.shapes import Shapes

    parts, preset, remarks = _model(model, _format(fmt), models_dir)
    shapes, work = Shapes.of(parts), _work(preset, size, steps, guidance, batch)
    cards = _cards(card)
    console = Console(highlight=False)
    if len(cards) == 1:
        ((_, only),) = cards.items()
        found = _plan(shapes, work, only, vram)
        if isinstance(found, PlacementError):
            raise found
        if as_json:
            print(json.dumps(_as_json(found, preset.name), indent=1))
        else:
            _page(console, found, preset.name, remarks)
        return
    found_all = {name: _plan(shapes, work, each, vram) for name, each in cards.items()}
    if as_json:
        print(json.dumps({name: _as_json(each, preset.name) for name, each in found_all.items()}, indent=1))
    else:
        _overview(console, cards, found_all, preset.name, shapes, work, remarks)


def _format(text: str | None) -> Literal["fp8", "bf16"] | None:
    match text:
        case None | "fp8" | "bf16":
            return text
        case _:
            raise RequestError(f"--format {text}: use fp8 or bf16.")


def _work(preset: Preset, size: str | None, steps: int | None, guidance: float | None, batch: int) -> Work:
    from octavo.placement.work import Work

    guided = (preset.guidance_scale if guidance is None else guidance) != 1
    sides = {"width": preset.width, "height": preset.height, **parse_size(size)}
    passes = 2 if guided else 1
    return Work(
        **sides, steps=preset.steps if steps is None else steps, rows=passes * batch, prompts=passes, pictures=batch
    )


def _cards(name: str | None) -> dict[str, Card | None]:
    """By name the cards to plan for; None where this machine has none that is known, and none was named."""
    from octavo.placement.cards import CARDS, card_called, card_here

    if name == EVERY:
        return dict(CARDS)
    if name is not None:
        return {name: card_called(name)}
    from octavo.devices import pick_device

    device = pick_device()
    here = card_here(device)
    if here is not None or device.type == "cuda":
        return {"here": here}
    return dict(CARDS)


def _plan(shapes: Shapes, work: Work, card: Card | None, vram: str | None) -> Plan | PlacementError:
    """The plan, or why there is none."""
    from octavo.devices import free_bytes, pick_device
    from octavo.placement.plan import make_plan
    from octavo.placement.sizes import parse_bytes

    if card is not None:
        budget = card.usable if vram is None else parse_bytes(vram, total=card.memory)
    else:
        free = free_bytes(pick_device())
        if vram is None and free is None:
            raise RequestError("How much memory is free here is not known. Say what may be used, such as --vram 6GB.")
        budget = (free or 0) if vram is None else parse_bytes(vram, total=free)
    try:
        return make_plan(shapes, budget, card, work=work)
    except PlacementError as error:
        return error


def _model(
    name: str, fmt: Literal["fp8", "bf16"] | None, models_dir: str | None
) -> tuple[Mapping[str, nn.Module], Preset, list[str]]:
    """The parts of a model on the meta device, its settings, and what the reader should know of them."""
    from octavo.checkpoint.skeletons import RELEASED, released, skeletons

    if name in RELEASED:
        return skeletons(name, fmt or "fp8"), released(name).preset, []
    return _of_file(name, fmt, models_dir)


def _of_file(
    name: str, fmt: Literal["fp8", "bf16"] | None, models_dir: str | None
) -> tuple[Mapping[str, nn.Module], Preset, list[str]]:
    """As `_model`: the parts that belong to the file; those that are nowhere as they were released."""
    from octavo.checkpoint.kinds import TITLES, Kind
    from octavo.checkpoint.skeletons import skeleton
    from octavo.errors import ModelNotFoundError
    from octavo.pipeline.assemble import load

    parts: dict[str, nn.Module] = {}
    try:
        components = load(
            name, models_dir=models_dir, device="cpu", force_fp8=fmt == "fp8", force_fp8_text_encoders=fmt == "fp8"
        )
        for part in (*components.encoders, components.mmdit, components.vae):
            parts[part.kind] = part.skeleton
        has_fp8, preset = components.mmdit.fp8_linears > 0, components.preset
    except ModelNotFoundError:
        # The file alone, if it is there at all.
        has_fp8, preset = _file_alone(name, fmt, models_dir, parts)
    if has_fp8 and fmt == "bf16":
        raise RequestError(f"'{name}' has FP8 weights, which stay so. Leave --format out, or give a 16-bit file.")
    kinds: tuple[Kind, ...] = ("clip_l", "clip_g", "t5", "vae")
    lacking = [kind for kind in kinds if kind not in parts]
    parts |= {kind: skeleton(kind, "fp8" if has_fp8 else "bf16") for kind in lacking}
    titles = ", ".join(TITLES[kind] for kind in lacking)
    return parts, preset, [f"Not found, taken as released: {titles}."] if lacking else []


def _file_alone(
    name: str, fmt: Literal["fp8", "bf16"] | None, models_dir: str | None, parts: dict[str, nn.Module]
) -> tuple[bool, Preset]:
    """Put what is inside of the file into `parts`; whether the MMDiT is in FP8, and its settings."""
    from pathlib import Path

    from octavo.checkpoint.folders import MODELS, Folders
    from octavo.checkpoint.plan import plan_part
    from octavo.checkpoint.presets import preset_for
    from octavo.checkpoint.skeletons import in_fp8
    from octavo.checkpoint.source import open_source
    from octavo.models import MMDiTConfig

    folders = Folders.standard(None if models_dir is None else Path(models_dir))
    with open_source(folders.find(name, *MODELS)) as source:
        needed = source.require("mmdit")
        for located in source.parts:
            planned, kind = plan_part(located), located.part.kind
            if fmt == "fp8" and kind != "vae":
                in_fp8(planned.model, kind)
            parts[kind] = planned.model
            if located is needed:
                assert isinstance(planned.config, MMDiTConfig)
                found = bool(planned.fp8_linears) or fmt == "fp8", preset_for(planned.config, located.file)
    return found


def _as_json(found: Plan | PlacementError, model: str) -> dict[str, Any]:
    from octavo.placement.predictions import prediction

    if isinstance(found, PlacementError):
        return {"model": model, "refused": str(found), "least": found.least}
    return {"model": model, **prediction(found)}


def _page(console: Console, plan: Plan, model: str, remarks: list[str]) -> None:
    """One plan: where each part lives, and each stage."""
    from rich.table import Table
    from rich.text import Text

    from octavo.placement.sizes import human

    work, card = plan.work, plan.card
    console.print(Text(f"{model}, {_told(work)}", "bold"))
    if card is not None:
        console.print(f"{card.name}, {human(card.memory)}; rates: {card.source}")
    console.print(f"May use {human(plan.budget)}, uses {human(plan.peak)} at most.\n")
    parts = Table("part", "weights", "where it lives", box=None, pad_edge=False, header_style="dim")
    for kind, part in plan.shapes.parts.items():
        parts.add_row(_title(kind), human(part.nbytes), _lives(part, plan.parts[kind], plan.modulation_streamed))
    console.print(parts, "")
    stages = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("stage", "peak", "weights", "buffers", "work"):
        stages.add_column(title, justify="left" if title == "stage" else "right")
    if card is not None:
        stages.add_column("seconds (predicted)", justify="right")
        stages.add_column("of which waits for copies", justify="right")
    for name, stage in plan.stages.items():
        row = [name, *(human(n) for n in (stage.peak, stage.weights, stage.buffers, stage.work))]
        if stage.seconds is not None:
            row += [f"{stage.seconds:.3g}", f"{plan.timeline.waited(name):.2g}"]
        stages.add_row(*row)
    console.print(stages, "")
    if plan.seconds is not None:
        console.print(f"Predicted: {plan.seconds:.3g} s for {_pictures(work)} after the first; nothing was measured.")
    else:
        console.print("For predicted times, name a card: --card rtx-4070-12gb, or --card all.")
    if plan.tile is not None:
        console.print("Tiles of the VAE change a picture a little; with more memory it is decoded whole.")
    for remark in remarks:
        console.print(remark, markup=False)


def _overview(
    console: Console,
    cards: Mapping[str, Card | None],
    found: Mapping[str, Plan | PlacementError],
    model: str,
    shapes: Shapes,
    work: Work,
    remarks: list[str],
) -> None:
    """A line for each card."""
    from rich.table import Table
    from rich.text import Text

    from octavo.placement.sizes import human

    console.print(Text(f"{model}, {human(shapes.nbytes)} of weights, {_told(work)}", "bold"))
    console.print("Predicted by simulated cards; nothing was measured.\n")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("card", "memory", "peak", "seconds", "what does not stay on the card"):
        table.add_column(title, justify="left" if title in ("card", "what does not stay on the card") else "right")
    for name, card in cards.items():
        assert card is not None
        plan = found[name]
        if isinstance(plan, PlacementError):
            table.add_row(name, human(card.memory), "", "", f"does not fit: {human(plan.least)} is the least")
            continue
        seconds = "" if plan.seconds is None else f"{plan.seconds:.3g}"
        table.add_row(name, human(card.memory), human(plan.peak), seconds, _moves(plan))
    console.print(table)
    for remark in remarks:
        console.print(remark, markup=False)


def _lives(part: PartShape, stay: Stay, modulation_streamed: bool) -> str:
    from octavo.placement.sizes import human

    if not stay.layers:
        return "comes when needed and leaves" if stay.leaves else "on the card"
    words = []
    if stay.streamed:
        passing = [part.units[i] for i in stay.streamed_units]
        buffers = f"through {min(stay.slots, len(passing))} buffers of {human(max(passing))}"
        kept = f"{stay.resident} of {stay.layers} blocks on the card, the others" if stay.resident else "every layer"
        words.append(f"{kept} {'pass' if stay.resident else 'passes'} {buffers}")
    else:
        words.append("comes when needed and leaves" if stay.leaves else "on the card")
    if part.modulation and modulation_streamed:
        words.append(f"modulation ({human(sum(part.modulation))}) passes once a run")
    return "; ".join(words)


def _moves(plan: Plan) -> str:
    encoders = [plan.parts[kind] for kind in plan.shapes.encoders]
    words = []
    if any(stay.streamed for stay in encoders):
        words.append("encoders pass layer by layer")
    if plan.modulation_streamed:
        words.append("modulation passes once a run")
    blocks = plan.parts["mmdit"]
    if blocks.streamed:
        words.append(f"{blocks.layers - blocks.resident} of {blocks.layers} blocks pass at each step")
    if plan.tile is not None:
        words.append(f"VAE in tiles of {8 * plan.tile} pixels")
    return "; ".join(words) or "nothing"


def _told(work: Work) -> str:
    return f"{work.width}x{work.height} pixels, {work.steps} steps, {work.rows} rows a step, {work.tokens} text tokens"


def _pictures(work: Work) -> str:
    return "a picture" if work.pictures == 1 else f"{work.pictures} pictures"


def _title(kind: str) -> str:
    names = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5", "mmdit": "MMDiT", "vae": "VAE"}
    return names.get(kind, kind)
