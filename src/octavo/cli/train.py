"""`octavo train demo`: make the embedded model again, or a better one; `octavo train judge`: its judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.errors import RequestError

if TYPE_CHECKING:
    from octavo.models import VAE

train = typer.Typer(help="Train models.", no_args_is_help=True)

EPILOG = """[bold]Example[/], the model of the package on two cores:

octavo train demo --stage 0 --minutes 15 && octavo train demo --stage 1 --minutes 10 && …

Each call goes on where the folder stands; a call that was stopped is finished by repeating it."""


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

    vae = octavo.load().vae()
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
