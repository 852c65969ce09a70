"""`octavo generate`: prompts in, picture files out. Paths go to stdout, everything else to stderr."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli import arithmetic, hires, memory
from octavo.cli.log import show_log
from octavo.cli.progress import progress_bar
from octavo.cli.threads import Threads
from octavo.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.pipeline.components import Components
    from octavo.pipeline.control_request import ControlImage
    from octavo.pipeline.request import GenerateRequest, Lora

EPILOG = """[bold]Examples[/]

octavo generate "a large red star on a blue background"

octavo generate "a photo of a fox" --model sd3.5_large_fp8_scaled --size 1024x768 --steps 28 --guidance 4.5

octavo generate "the same, at night" --image fox.png --denoise 0.6 --model sd3.5_medium

octavo generate "a red fox on a bench" --image park.png --mask bench.png --model sd3.5_large

octavo generate "a red fox <lora:watercolour:0.8>" --lora hands.safetensors:0.6 --model sd3.5_large

octavo generate "a red heart on a white background" --control canny:photo.png --control-strength 0.8

octavo generate "a park, trees" --image park.png --outpaint 256,0,256,0 --model sd3.5_large

octavo generate "a harbour at dusk, photograph" --size 1024x1024 --hires 1.5 --hires-steps 20 --model sd3.5_large

octavo generate --from output/octavo-00001.png --seed 7 --speed fast

octavo generate - < prompts.txt --batch 2 --out pictures/
"""


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to draw; '-' reads one prompt a line from standard input.")
    ] = None,
    negative: Annotated[str | None, typer.Option("--negative", "-n", help="What the picture should not show.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar="OCTAVO_MODEL",
            help="Name or path of a model; without one the embedded model draws.",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA file or name, with its strength after a colon, such as hands:0.8; may be repeated. The prompt "
            "can ask for it too: <lora:hands:0.8>."
        ),
    ] = None,
    text_encoder: Annotated[
        list[str] | None, typer.Option(help="Encoder to use instead of those found with the model; may be repeated.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="VAE to use instead of the one found with the model.")] = None,
    models_dir: Annotated[
        Path | None, typer.Option(envvar="OCTAVO_MODELS", help="Folder laid out as ComfyUI's models/.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", "-s", help="Width x height in pixels, such as 1024x768.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", "-g", help="Guidance scale (CFG); 1 switches it off.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, dpmpp_2m, heun, … as ComfyUI names them.")] = None,
    schedule: Annotated[str | None, typer.Option(help="simple, sgm_uniform, beta, karras, …")] = None,
    shift: Annotated[float | None, typer.Option(help="Shift of the schedule; 3 for the released models.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture; drawn by lot when not given.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", "-b", help="Pictures a prompt; the seed counts up.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File (.png, .webp, .jpg) or folder.  [default: output/]", show_default=False),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to start from.")] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Picture of --image's proportions: white where it is drawn anew, black where it is kept."),
    ] = None,
    mask_grow: Annotated[int | None, typer.Option(help="Pixels of --image by which --mask is made larger.")] = None,
    mask_feather: Annotated[
        int | None, typer.Option(help="Pixels of --image over which the edge of --mask, or of --outpaint, is softened.")
    ] = None,
    outpaint: Annotated[
        str | None, typer.Option(help="Pixels to add to --image at left, top, right and bottom, such as 0,0,256,0.")
    ] = None,
    denoise: Annotated[
        float | None,
        typer.Option(
            help="How much of --image to make anew, 0 to 1.  [default: 0.6; 1 with --mask]", show_default=False
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="Picture to follow: canny:photo.png follows its edges, depth:… and blur:… such pictures; or "
            "model=file,image=picture.png,strength=0.8,end=0.6. May be repeated."
        ),
    ] = None,
    control_strength: Annotated[
        float | None, typer.Option(help="Strength of each --control that says none, 0 to 10.")
    ] = None,
    control_start: Annotated[float | None, typer.Option(help="Fraction of the schedule from which on it acts.")] = None,
    control_end: Annotated[float | None, typer.Option(help="Fraction of the schedule up to which it acts.")] = None,
    hires_size: hires.Wanted = None,
    hires_method: hires.Method = None,
    hires_denoise: hires.Denoise = None,
    hires_steps: hires.Steps = None,
    hires_guidance: hires.Guidance = None,
    hires_sampler: hires.Sampler = None,
    hires_schedule: hires.Schedule = None,
    hires_prompt: hires.Prompt = None,
    hires_negative: hires.Negative = None,
    slg: Annotated[
        float | None, typer.Option(help="Scale of skip-layer guidance; 0 is off. Made for SD3.5 Medium.")
    ] = None,
    rescale: Annotated[float | None, typer.Option(help="Guidance rescale, 0 to 1.")] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(help="Part of the steps that is guided, such as 0.1-0.8.")
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option(help="exact, balanced or fast: how many evaluations are forecast, not made (exact if unsaid)."),
    ] = None,
    clip_skip: Annotated[int | None, typer.Option(help="Which of CLIP's last layers is read; 2 for SD3.")] = None,
    tiled_vae: Annotated[
        bool | None,
        typer.Option("--tiled-vae/--whole-vae", help="Decode in tiles, or never; by free memory if unsaid."),
    ] = None,
    repeat: Annotated[
        Path | None, typer.Option("--from", help="Picture of Octavo's whose settings are used again.")
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Keep a small preview beside the output while denoising.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the fastest if unsaid.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; what suits the device if unsaid.")
    ] = None,
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the paths.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell how each part of the model multiplies, and why.")
    ] = False,
    fast: arithmetic.Fast = False,
    force_fp8: arithmetic.ForceFp8 = False,
    force_fp8_text_encoders: arithmetic.ForceFp8TextEncoders = False,
    vram: memory.Vram = None,
    backend: arithmetic.BackendName = None,
    measure: arithmetic.Measure = None,
    retry_bf16: arithmetic.RetryBf16 = False,
    unet_e4m3fn: arithmetic.UnetE4m3fn = False,
    unet_e5m2: arithmetic.UnetE5m2 = False,
    text_enc_e4m3fn: arithmetic.TextEncE4m3fn = False,
    text_enc_e5m2: arithmetic.TextEncE5m2 = False,
    supports_fp8_compute: arithmetic.SupportsFp8Compute = False,
    attention: arithmetic.AttentionName = None,
    compile: arithmetic.Compile = False,
    graphs: arithmetic.Graphs = None,
) -> None:
    """Draw pictures from words."""
    from rich.console import Console

    from octavo.pipeline.image import picture_format

    console = Console(stderr=True, quiet=quiet, highlight=False)
    if verbose:
        show_log(console)
    given = {
        "negative_prompt": negative, "steps": steps, "guidance_scale": guidance, "sampler": sampler,
        "schedule": schedule, "shift": shift, "seed": seed, "batch": batch, "guidance_rescale": rescale,
        "clip_skip": clip_skip, "denoise": _share(denoise, image, mask or outpaint),
        "controls": _controls(control, strength=control_strength, start=control_start, end=control_end),
        "loras": _loras(lora), "image": str(image) if image else None, "mask": str(mask) if mask else None,
        "speed": speed, "mask_grow": mask_grow, "mask_feather": mask_feather, "outpaint": _borders(outpaint),
        "hires": hires.asked(
            hires_size, method=hires_method, denoise=hires_denoise, steps=hires_steps, guidance_scale=hires_guidance,
            sampler=hires_sampler, schedule=hires_schedule, prompt=hires_prompt, negative_prompt=hires_negative,
        ),
        **parse_size(size), **_interval(guidance_interval), **_skip_layers(slg),
    }  # fmt: skip
    requests = _requests(_texts(prompt, prompts), repeat, given)
    if out is not None and _is_file(out):
        picture_format(out)
        if len(requests) * max(r.batch for r in requests) > 1:
            raise RequestError(f"Several pictures are asked for but --out names one file, {out}; give a folder.")

    from octavo.pipeline.assemble import load
    from octavo.placement.threads import is_large, take_threads

    with console.status("Loading …"):
        components = load(
            model or requests[0].model,
            models_dir=models_dir,
            text_encoders=text_encoder or (),
            vae=vae,
            device=device,
            dtype=dtype,
            tiled_vae=tiled_vae,
            vram=memory.allowed(vram, device),
            **arithmetic.settings(
                fast=fast,
                force_fp8=force_fp8,
                force_fp8_text_encoders=force_fp8_text_encoders,
                backend=backend,
                measure=measure,
                retry_bf16=retry_bf16,
                unet_e4m3fn=unet_e4m3fn,
                unet_e5m2=unet_e5m2,
                text_enc_e4m3fn=text_enc_e4m3fn,
                text_enc_e5m2=text_enc_e5m2,
                supports_fp8_compute=supports_fp8_compute,
                attention=attention,
                compile=compile,
                graphs=graphs,
            ),
        )
    take_threads(threads, components.device, measure=is_large(components.mmdit.skeleton))
    console.print(components.headline)
    if model is None and requests[0].model is None:
        console.print(
            f"No --model is given, so the small embedded one draws; 'octavo info {components.name}' tells more."
        )
    texts = [prompt for r in requests for prompt in (r.prompt, r.hires.prompt if r.hires else None) if prompt]
    for remark in dict.fromkeys([*components.warnings, *(r for p in texts for r in components.remarks(p))]):
        console.print(remark, style="yellow", markup=False)
    known = (components.preset.width, components.preset.height)
    if components.embedded and any(size != known for request in requests for size in _sizes(request, known)):
        console.print(f"It has only seen {known[0]}x{known[1]} pictures; other sizes come out worse.", style="yellow")
    for request in requests:
        _draw(console, components, request, out, preview)


def _draw(
    console: "Console", components: "Components", request: "GenerateRequest", out: Path | None, preview: bool
) -> None:
    """Draw one request, saving each picture as soon as it is finished, so that Ctrl-C keeps what is done."""
    from octavo.pipeline.generate import generate_each

    folder = (out.parent if out and _is_file(out) else out) or Path("output")
    with progress_bar(console, components, folder if preview else None) as watch:
        for picture in generate_each(components, request, watch=watch):
            path = picture.save(_target(out))
            print(path, flush=True)


def _texts(prompt: str | None, prompts: Path | None) -> list[str]:
    """The prompts of all sources, in order."""
    texts = []
    if prompt == "-":
        texts += [line.strip() for line in typer.get_text_stream("stdin") if line.strip()]
    elif prompt is not None:
        texts.append(prompt)
    if prompts is not None:
        try:
            texts += [line.strip() for line in prompts.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeError) as error:
            raise RequestError(f"Cannot read the prompts of {prompts}: {error}.") from error
    if not texts and (prompts is not None or prompt == "-"):
        raise RequestError("There is no prompt in the input; write one a line.")
    return texts


def _requests(texts: list[str], repeat: Path | None, given: dict[str, Any]) -> list["GenerateRequest"]:
    """One request a prompt; the user's words over those of the picture to repeat."""
    from octavo.pipeline.image import read_settings
    from octavo.pipeline.request import GenerateRequest

    given = {key: value for key, value in given.items() if value is not None}
    base = None if repeat is None else GenerateRequest.from_settings(read_settings(repeat))
    if "hires" in given:
        given["hires"] = hires.laid_over(base.hires if base else None, given["hires"])
    if base is not None:
        return [replace(base, **given, prompt=text) for text in texts] or [replace(base, **given)]
    if not texts:
        raise RequestError('Say what to draw: octavo generate "a red star", --prompts FILE, or --from PICTURE.')
    return [GenerateRequest(prompt=text, **given) for text in texts]


def _sizes(request: "GenerateRequest", usual: tuple[int, int]) -> list[tuple[int, int]]:
    """Those that are drawn, one after the other."""
    first = request.width or usual[0], request.height or usual[1]
    return [first, *([] if request.hires is None else [request.hires.size(*first)])]


def parse_size(text: str | None) -> dict[str, int]:
    """`1024x768` as settings; none where nothing is given."""
    if text is None:
        return {}
    width, _, height = text.lower().replace("×", "x").partition("x")
    if not (width.strip().isdigit() and (height or width).strip().isdigit()):
        raise RequestError(f"--size {text}: write width x height in pixels, such as 1024x768.")
    return {"width": int(width), "height": int(height or width)}


def _interval(text: str | None) -> dict[str, float]:
    if text is None:
        return {}
    start, _, end = text.partition("-")
    try:
        return {"guidance_start": float(start), "guidance_end": float(end)}
    except ValueError:
        raise RequestError(f"--guidance-interval {text}: write two fractions, such as 0.1-0.8.") from None


def _share(denoise: float | None, image: Path | None, mask: Path | str | None) -> float | None:
    """How much is made anew: as asked, else as suits what is given; what a mask marks should not shine through."""
    if denoise is None and (image or mask):
        return 1.0 if mask else 0.6
    return denoise


def _skip_layers(scale: float | None) -> dict[str, Any]:
    if scale is None:
        return {}
    from octavo.sampling.guidance import SkipLayerGuidance

    return {"skip_layer_guidance": SkipLayerGuidance(scale=scale)}


def _borders(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        raise RequestError(f"--outpaint {text}: write pixels at left, top, right and bottom, such as 0,0,256,0.")
    return tuple(map(int, parts))


def _controls(texts: list[str] | None, **given: float | None) -> "tuple[ControlImage, ...] | None":
    from octavo.pipeline.control_request import control_called

    if not texts and any(value is not None for value in given.values()):
        raise RequestError("--control-strength, --control-start and --control-end say how a --control acts: give one.")
    return tuple(control_called(text, **given) for text in texts or ()) or None


def _loras(given: list[str] | None) -> "tuple[Lora, ...] | None":
    return tuple(map(lora_called, given or ())) or None


def lora_called(text: str) -> "Lora":
    """A LoRA with the strength after its last colon, or at full strength."""
    from octavo.pipeline.request import Lora

    name, colon, number = text.rpartition(":")
    if not colon or "/" in number or "\\" in number:  # a colon may be part of a folder's name, too
        return Lora(text)
    try:
        return Lora(name, float(number))
    except ValueError:
        raise RequestError(f"LoRA {text}: '{number}' is not a strength; write name:0.8.") from None


def _is_file(out: Path) -> bool:
    """Whether --out names a file rather than a folder."""
    return bool(out.suffix) and not out.is_dir()


def _target(out: Path | None) -> Path:
    """The file to write: the one named, or the next free number in a folder."""
    if out is not None and _is_file(out):
        return out
    folder = out or Path("output")
    numbers = [int(p.stem[7:]) for p in folder.glob("octavo-*.png") if p.stem[7:].isdigit()]
    return folder / f"octavo-{max(numbers, default=0) + 1:05}.png"
