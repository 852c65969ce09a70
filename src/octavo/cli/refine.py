"""`octavo refine`: a part of a picture drawn anew at full size. The path goes to stdout, everything else to stderr."""

from pathlib import Path
from typing import Annotated, Any

import typer

from octavo.cli import arithmetic, memory
from octavo.cli.generate import lora_called, parse_size
from octavo.cli.progress import progress_bar
from octavo.cli.threads import Threads
from octavo.errors import RequestError

EPILOG = """[bold]Examples[/]

octavo refine fox.png "a fox's eye" --region 410,220,96,80

octavo refine people.png "a hand with five fingers" --mask hand.png --denoise 0.45 --lora hands:0.8
--negative "bad hands, extra fingers, fused fingers" --follow-edges 0.5 --model sd3.5_large"""

HOW, MODEL = "How it is drawn", "Model"


def refine(
    picture: Annotated[Path, typer.Argument(help="Picture of which a part is drawn anew.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What the part shows; what the picture was drawn with if not given.")
    ] = None,
    region: Annotated[
        str | None, typer.Option(help="The part: x, y, width and height in pixels, such as 410,220,96,80.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Or a picture of the same proportions, white on the part.")] = None,
    context: Annotated[int, typer.Option(help="Pixels around the part that the model sees and leaves alone.")] = 32,
    feather: Annotated[int, typer.Option(help="Pixels over which new and old are blended.")] = 8,
    denoise: Annotated[
        float, typer.Option(help="How much of the part to make anew, 0 to 1.", rich_help_panel=HOW)
    ] = 0.5,
    negative: Annotated[
        str | None, typer.Option("--negative", "-n", help="What the part should not show.", rich_help_panel=HOW)
    ] = None,
    follow_edges: Annotated[
        float,
        typer.Option(
            help="Keep the part's outlines by the model's Canny ControlNet, this strongly; 0 is off.",
            rich_help_panel=HOW,
        ),
    ] = 0.0,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA for the part, such as hands:0.8; may be repeated.", rich_help_panel=HOW),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", "-s", help="What it is enlarged to; as the model likes if unsaid.", rich_help_panel=HOW),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.", rich_help_panel=HOW)] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", "-g", help="Guidance scale (CFG).", rich_help_panel=HOW)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Drawn by lot when not given.", rich_help_panel=HOW)] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write.  [default: NAME-refined.png beside it]", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", envvar="OCTAVO_MODEL", help="Name or path of a model.", rich_help_panel=MODEL),
    ] = None,
    models_dir: Annotated[
        Path | None,
        typer.Option(envvar="OCTAVO_MODELS", help="Folder laid out as ComfyUI's models/.", rich_help_panel=MODEL),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the fastest if unsaid.", rich_help_panel=MODEL)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; what suits the device.", rich_help_panel=MODEL)
    ] = None,
    threads: Threads = None,
    vram: memory.Vram = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the path.")] = False,
    fast: arithmetic.Fast = False,
    force_fp8: arithmetic.ForceFp8 = False,
) -> None:
    """Draw a part of a picture anew, at the model's full size, and blend it in.

    What is outside of the part and its feather stays as it is, to the pixel. A PNG keeps what was written into it.
    """
    from rich.console import Console

    from octavo.pipeline.image import picture_format
    from octavo.pipeline.refine import Refinement
    from octavo.pipeline.refine import refine as run
    from octavo.pipeline.request import GenerateRequest

    console = Console(stderr=True, quiet=quiet, highlight=False)
    refinement = Refinement(
        region=_region(region),
        mask=str(mask) if mask else None,
        context=context,
        feather=feather,
        follow_edges=follow_edges,
    )
    target = out or picture.with_name(f"{picture.stem}-refined.png")
    picture_format(target)
    said = _said(picture, needed=prompt is None)
    drawn: dict[str, Any] = {
        "prompt": prompt or said["prompt"],
        "negative_prompt": negative or "",
        "loras": tuple(lora_called(text) for text in lora or ()),
        "steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        **parse_size(size),
    }
    request = GenerateRequest(**drawn)

    from octavo.pipeline.assemble import load
    from octavo.placement.threads import is_large, take_threads

    with console.status("Loading …"):
        components = load(
            model or said.get("model"),
            models_dir=models_dir,
            device=device,
            dtype=dtype,
            fast=fast,
            force_fp8=force_fp8,
            vram=memory.allowed(vram, device),
        )
    take_threads(threads, components.device, measure=is_large(components.mmdit.skeleton))
    console.print(components.headline)
    for remark in dict.fromkeys([*components.warnings, *components.remarks(request.prompt)]):
        console.print(remark, style="yellow", markup=False)
    with progress_bar(console, components) as watch:
        refined = run(components, str(picture), request, refinement, denoise=denoise, watch=watch)
    print(refined.save(target), flush=True)


def _said(picture: Path, *, needed: bool) -> dict[str, Any]:
    """What the picture was drawn with; nothing where it does not say so and need not."""
    from octavo.pipeline.image import open_image, read_settings

    open_image(picture)
    try:
        return read_settings(picture)
    except RequestError as error:
        if not needed:
            return {}
        raise RequestError(f'{error} So say what the part shows: octavo refine {picture.name} "…".') from error


def _region(text: str | None) -> tuple[int, int, int, int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        raise RequestError(f"--region {text}: write x, y, width and height in pixels, such as 410,220,96,80.")
    x, y, width, height = map(int, parts)
    return x, y, width, height
