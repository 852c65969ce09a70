"""`octavo train lora`: teach a model something new from a folder of pictures."""

from pathlib import Path
from typing import Annotated, cast

import typer

from octavo.cli.threads import Threads

EPILOG = """[bold]Examples[/]

octavo train lora --data foxes/ --out fox.safetensors --model sd3.5_medium --rank 16 --steps 1500 --batch 1

octavo generate "a fox <lora:fox:1>" --model sd3.5_medium --lora fox.safetensors

A run that was stopped goes on when its command is repeated."""

TRAINING, MODEL = "Training", "Model"


def lora(
    data: Annotated[
        Path, typer.Option(help="Folder of pictures, each with a .txt of the same name, or with a metadata.jsonl.")
    ],
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    rank: Annotated[int, typer.Option(help="Of the branches: 4 to 64.", rich_help_panel=TRAINING)] = 16,
    steps: Annotated[int, typer.Option(help="Of training.", rich_help_panel=TRAINING)] = 1000,
    batch: Annotated[int, typer.Option(help="Pictures a step.", rich_help_panel=TRAINING)] = 4,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Of AdamW; 0.0002, or 0.002 for the embedded model, if unsaid.", rich_help_panel=TRAINING),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Branches count alpha / rank times; the rank if unsaid.", rich_help_panel=TRAINING),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="attention, blocks (with MLPs) or all (with modulation).", rich_help_panel=TRAINING)
    ] = "blocks",
    size: Annotated[
        int | None,
        typer.Option(
            help="Side of a square of as many pixels as each picture is brought to; as suits the model if unsaid.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    drop_captions: Annotated[
        float, typer.Option(help="Share of steps without captions, for guidance.", rich_help_panel=TRAINING)
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of weights, order and noise.", rich_help_panel=TRAINING)] = 0,
    caption: Annotated[str | None, typer.Option(help="Of pictures that have none of their own.")] = None,
    form: Annotated[str, typer.Option("--format", help="Names in the file: diffusers or kohya.")] = "diffusers",
    sample_every: Annotated[int, typer.Option(min=0, help="Steps between sheets of pictures; 0 for none.")] = 0,
    sample_prompt: Annotated[
        list[str] | None, typer.Option(help="What the sheets show; may be repeated. Captions of the folder if unsaid.")
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            help="Compute activations twice rather than keep them; for large models if unsaid.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for unfinished work and sheets, kept; beside --out if unsaid.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar="OCTAVO_MODEL",
            help="The base, 16-bit or FP8; the embedded one if unsaid.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    text_encoder: Annotated[
        list[str] | None, typer.Option(help="Use this one; may be repeated.", rich_help_panel=MODEL)
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Use this one.", rich_help_panel=MODEL)] = None,
    models_dir: Annotated[
        Path | None, typer.Option(envvar="OCTAVO_MODELS", help="Root of the models tree.", rich_help_panel=MODEL)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the fastest here if unsaid.", rich_help_panel=MODEL)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=MODEL)] = None,
    threads: Threads = None,
    force_fp8: Annotated[
        bool, typer.Option("--force-fp8", help="Quantize the base at load, to save memory.", rich_help_panel=MODEL)
    ] = False,
) -> None:
    """Train a LoRA on a frozen model, 16-bit or FP8, from pictures with captions."""
    from octavo.checkpoint.lora_form import LoraForm
    from octavo.pipeline.assemble import load
    from octavo.placement.threads import is_large, take_threads
    from octavo.train.lora import LoraRecipe, train_lora

    recipe = LoraRecipe(
        rank=rank,
        alpha=alpha,
        layers=layers,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        size=size,
        drop_captions=drop_captions,
        seed=seed,
    )
    components = load(
        model,
        models_dir=models_dir,
        text_encoders=text_encoder or (),
        vae=vae,
        device=device,
        dtype=dtype,
        force_fp8=force_fp8,
        planned=False,
    )
    take_threads(threads, components.device, measure=is_large(components.mmdit.skeleton))

    def report(line: str) -> None:
        typer.echo(line, err=True)

    report(components.headline)
    path = train_lora(
        components,
        data,
        out,
        recipe=recipe,
        form=cast("LoraForm", form),
        caption=caption,
        work=work,
        checkpointing=checkpointing,
        sample_every=sample_every,
        sample_prompts=sample_prompt or (),
        report=report,
    )
    typer.echo(path)
