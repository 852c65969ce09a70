"""`octavo train demo`: make the embedded model again, or a better one; `octavo train judge`: its judge; `octavo train
controlnet`: its ControlNet; `octavo train distil`: an FP8 file brought closer to the model it came from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.threads import Threads
from octavo.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from octavo.compress.finetune import Progress
    from octavo.models import VAE

train = typer.Typer(help="Train models.", no_args_is_help=True)

EPILOG = """[bold]Example[/], the model of the package on two cores:

octavo train demo --stage 0 --minutes 15 && octavo train demo --stage 1 --minutes 10 && …

Each call goes on where the folder stands; a call that was stopped is finished by repeating it."""


RUNS, MODEL = "What to learn from", "Model"
DISTIL_EPILOG = """[bold]Examples[/]

octavo quantize sd3.5_medium.safetensors medium-row.safetensors --recipe row
octavo train distil medium-row.safetensors --teacher sd3.5_medium.safetensors --rank 16 --out medium-tuned.safetensors

A run that was stopped goes on when its command is repeated. The embedded model learns in a few minutes on two cores:

octavo quantize octavo-demo row.safetensors --recipe row && octavo train distil row.safetensors --teacher octavo-demo --rank 16 --out tuned.safetensors"""  # noqa: E501


@train.callback()
def _group() -> None:
    """Train models."""


@train.command(epilog=EPILOG)
def demo(
    stage: Annotated[
        int, typer.Option(min=0, max=5, help="0 trains the VAE, 1 to 5 the model on ever more kinds of pictures.")
    ],
    minutes: Annotated[float, typer.Option(min=0.01, help="Time for this stage, over all calls.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    preset: Annotated[str, typer.Option(help="Batch and data to suit a machine: cpu or h200.")] = "cpu",
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures a step.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks of the MMDiT; its width is 64 times this.")] = None,
    size: Annotated[int | None, typer.Option(min=32, help="Pixels a side.")] = None,
    export_to: Annotated[
        Path | None, typer.Option(help="Write the trained model as a ComfyUI tree to this folder.")
    ] = None,
) -> None:
    """Train the embedded model on pictures that Octavo draws itself."""
    from dataclasses import replace

    from octavo.train import demo as job
    from octavo.train.loop import Budget

    if device not in ("cpu", "cuda") and not device.startswith("cuda:"):
        raise RequestError(f"device {device!r} is not known; use cpu or cuda.")
    if preset not in job.PRESETS:
        raise RequestError(f"preset {preset!r} is not known; there are {', '.join(job.PRESETS)}.")
    recipe = job.PRESETS[preset]
    recipe = replace(recipe, batch=batch or recipe.batch, depth=depth or recipe.depth, size=size or recipe.size)
    budget = Budget(minutes=minutes)
    out.mkdir(parents=True, exist_ok=True)

    def report(line: str) -> None:
        print(line, flush=True)

    if stage == 0:
        vae = job.train_vae(out, budget=budget, recipe=recipe, device=device, report=report)
        _train_checker(vae, recipe.size, out / "checker.safetensors")
        return
    job.train_stage(out, stage, budget=budget, recipe=recipe, device=device, report=report)
    job.look(out, stage, recipe=recipe, device=device)
    if export_to is not None:
        for path in job.export_run(out, export_to, recipe=recipe):
            report(f"{path}  {path.stat().st_size:,} bytes")


@train.command()
def controlnet(
    minutes: Annotated[float, typer.Option(min=0.01, help="Time for training, over all calls.")] = 17.0,
    out: Annotated[
        Path, typer.Option(help="Folder of the run; it leaves octavo-demo-canny.safetensors, and -fp16 in 16 bits.")
    ] = (Path("runs/controlnet")),
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to draw and encode before.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the order of the pictures.")] = 0,
) -> None:
    """Train the embedded model's ControlNet, which makes it follow the edges of a picture.

    The model itself stays as it is; the lessons are drawn by Octavo. A call that was stopped is finished by repeating
    it.
    """
    import octavo
    from octavo.train import controlnet as job
    from octavo.train.loop import Budget

    components = octavo.load(device="cpu", dtype="float32")
    net, _ = job.train_controlnet(
        components,
        out,
        budget=Budget(minutes=minutes),
        recipe=job.ControlRecipe(pictures=pictures),
        seed=seed,
        report=lambda line: print(line, flush=True),
    )
    for path, fp8 in ((out / f"{job.NAME}.safetensors", True), (out / f"{job.NAME}-fp16.safetensors", False)):
        job.export_controlnet(net, path, fp8=fp8)
        print(f"{path}  {path.stat().st_size:,} bytes", flush=True)


@train.command()
def judge(
    minutes: Annotated[float, typer.Option(min=0.01, help="Time for training, over all calls.")] = 20.0,
    out: Annotated[Path, typer.Option(help="Folder of the run; the judge is its judge.safetensors.")] = Path(
        "runs/judge"
    ),
    seed: Annotated[int, typer.Option(help="Of the drawings and the first weights.")] = 0,
) -> None:
    """Train the judge that says how well a picture of the embedded model fits its words.

    Its pictures are drawn by Octavo, apart from those of the model's training and examination; half of them go through
    the embedded model's VAE. A call that was stopped is finished by repeating it.
    """
    import torch
    from torch import Tensor

    import octavo
    from octavo.evaluate.judge import Judge, save_judge
    from octavo.train import judge as job
    from octavo.train.captions import words
    from octavo.train.loop import Budget

    vae = octavo.load(device="cpu").vae()
    torch.manual_seed(seed)
    network = Judge(words(job.STAGE))

    def encode(pictures: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return network.image_features(pictures), network.text_features(captions)

    def reconstruct(pixels: Tensor) -> Tensor:
        return vae.decode(vae.encode(pixels)[:, :16])

    def report(line: str) -> None:
        print(line, flush=True)

    job.train_judge(
        network,
        encode,
        reconstruct,
        matrices=network.matrices(),
        folder=out,
        budget=Budget(minutes=minutes),
        recipe=job.JudgeRecipe(),
        seed=seed,
        report=report,
    )
    path = out / "judge.safetensors"
    save_judge(network, path)
    report(f"{path}  {path.stat().st_size:,} bytes")


@train.command(epilog=DISTIL_EPILOG)
def distil(
    student: Annotated[str, typer.Argument(help="FP8 file in Octavo's form, as 'octavo quantize' writes.")],
    teacher: Annotated[str, typer.Option(help="The 16-bit model that it was made from: a path or a name.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 500,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Give layers that have none a low-rank branch of this rank, such as 16."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file to learn from, one prompt a line; built-in ones if not given.", rich_help_panel=RUNS
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Largest relative change of a scale in a step.")] = 1e-4,
    batch: Annotated[int, typer.Option(min=1, help="Points of the teacher's runs in a step.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the teacher's runs and of the training.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="Pictures to learn from, such as 1024x1024.", rich_help_panel=RUNS)
    ] = None,
    sampling_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the teacher's runs.", rich_help_panel=RUNS)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of the teacher's runs.", rich_help_panel=RUNS)
    ] = None,
    text_encoder: Annotated[
        list[str] | None, typer.Option(help="Use this one; may be repeated.", rich_help_panel=MODEL)
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Use this one.", rich_help_panel=MODEL)] = None,
    models_dir: Annotated[Path | None, typer.Option(help="Root of the models tree.", rich_help_panel=MODEL)] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the fastest here if not given.", rich_help_panel=MODEL)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=MODEL)] = None,
    threads: Threads = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for unfinished work, kept afterwards; beside --out if not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it is there.")] = False,
) -> None:
    """Fine-tune an FP8 file so that it answers as its 16-bit teacher does.

    The teacher draws prompts; the student learns to give the same velocities at the same noisy latents. FP8 codes stay
    as they are: what is trained are scales, biases and low-rank branches. Before and after, the student draws prompts
    that are kept from training, and the better of the two files is written.
    """
    from rich.console import Console

    from octavo.cli.generate import parse_size
    from octavo.compress.finetune import finetune_checkpoint
    from octavo.compress.prompts import read_prompts
    from octavo.devices import pick_device
    from octavo.placement.threads import take_threads

    console = Console(stderr=True, highlight=False)
    take_threads(threads, pick_device(device), measure=True, lean=True)
    with _bar(console) as watch:
        result = finetune_checkpoint(
            teacher,
            student,
            out,
            steps=steps,
            prompts=None if prompts is None else read_prompts(prompts),
            rank=rank,
            learning_rate=learning_rate,
            batch=batch,
            seed=seed,
            **parse_size(size),
            sampling_steps=sampling_steps,
            guidance_scale=guidance,
            text_encoders=text_encoder or (),
            vae=vae,
            models_dir=models_dir,
            device=device,
            dtype=dtype,
            work=work,
            force=force,
            watch=watch,
        )
    console.print(str(result), markup=False)
    print(result.out)


@contextmanager
def _bar(console: "Console") -> Iterator["Callable[[Progress], None]"]:
    """A bar with the loss and the time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    said = {"record": "the teacher draws", "judge": "both draw", "train": "training"}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def watch(progress: "Progress") -> None:
            if progress.phase not in tasks:
                tasks[progress.phase] = bar.add_task("", total=progress.total)
            loss = "" if progress.loss is None else f", loss {100 * progress.loss:.1f} % of the first"
            bar.update(tasks[progress.phase], description=said[progress.phase] + loss, completed=progress.done)

        yield watch


def _train_checker(vae: "VAE", size: int, path: Path) -> None:
    """Teach the checker the shapes as this VAE shows them, and write it beside the VAE."""
    import torch
    from torch import Tensor

    from octavo.checkpoint.save import save_safetensors
    from octavo.evaluate.checker import train_classifier

    def reconstruct(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return vae.decode(vae.encode(pixels.to(next(vae.parameters()).device))[:, :16]).cpu()

    classifier = train_classifier(reconstruct, size=size)
    save_safetensors(path, {name: tensor.half() for name, tensor in classifier.state_dict().items()})
