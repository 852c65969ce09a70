"""Train the embedded model: a VAE first, then an MMDiT with its text encoders, stage by stage.

`train_vae` and `train_stage` are the two jobs; both go on where the run's folder stands. The world is `scenes`, its
pictures `drawing`, its words `captions`; files for use are made by `export`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.errors import RequestError
from octavo.models.vae import VAE
from octavo.sampling.flow import shift_sigma
from octavo.train.autoencoder import EMBEDDED_VAE, AutoencoderRecipe, fold_statistics, train_autoencoder
from octavo.train.captions import caption, words
from octavo.train.drawing import draw, to_bytes
from octavo.train.export import export
from octavo.train.latents import Pool, load_pool
from octavo.train.loop import Budget, Progress, Report, averaged_weights, read_progress, train
from octavo.train.model import DemoModel, Tokenization
from octavo.train.optimizer import OptimizerSettings
from octavo.train.pictures import contact_sheet, learning_curve, sketch
from octavo.train.scenes import MIXES, domain, sample_scene


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRecipe:
    """How the embedded model is trained; the defaults are those of the model in the package."""

    depth: int = 3  # blocks; the width is 64 times this
    size: int = 128  # pixels a side
    batch: int = 64
    pool: Mapping[str, int] = field(
        default_factory=lambda: {
            "plain": 8192,
            "placed": 16384,
            "pair": 24576,
            "several": 8192,
            "gradient": 8192,
            "word": 24576,
            "word and thing": 24576,
        }
    )  # pictures encoded by kind of scene
    empty_captions: float = 0.1  # share of captions that are empty, for classifier-free guidance
    encoder_dropout: float = 0.1  # share of captions that each encoder does not see
    # What flat pictures of this size show is settled while nearly all is noise: at sigma 0.9 a background's colour can
    # be told from the sum of its 256 latents alone. So most of the training has to happen above that.
    shift: float = 3.0  # of the noise levels, in training and in drawing
    steps: int = 20  # recommended for drawing, as is the next
    guidance_scale: float = 4.0
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)


# What differs between machines. The width stays: the package has 15 MB for the model in 16 bits and FP8 together.
PRESETS: Mapping[str, DemoRecipe] = MappingProxyType(
    {
        "cpu": DemoRecipe(),
        "h200": DemoRecipe(
            batch=1024,
            pool={
                "plain": 65536,
                "placed": 262144,
                "pair": 393216,
                "several": 65536,
                "gradient": 65536,
                "word": 262144,
                "word and thing": 262144,
            },
            autoencoder=AutoencoderRecipe(batch=256),
        ),
    }
)


def train_vae(folder: Path, *, budget: Budget, recipe: DemoRecipe, device: str = "cpu", report: Report = print) -> VAE:
    """Train the VAE in `folder`/vae and write it, its statistics folded in, to `folder`/vae.safetensors."""
    vae = train_autoencoder(folder / "vae", budget=budget, recipe=recipe.autoencoder, device=device, report=report)

    def batches(i: int) -> Tensor:
        rng = random.Random(f"statistics {i}")
        return draw([sample_scene(rng, max(MIXES)) for _ in range(32)], recipe.size, device)

    fold_statistics(vae, batches, noise=recipe.autoencoder.noise)
    save_file({name: t.cpu().contiguous() for name, t in vae.state_dict().items()}, folder / "vae.safetensors")
    return vae


def load_trained_vae(folder: Path, device: str = "cpu") -> VAE:
    """The VAE that `train_vae` wrote.

    Raises:
        RequestError: there is none yet.
    """
    path = folder / "vae.safetensors"
    if not path.exists():
        raise RequestError(f"'{folder}' has no trained VAE yet; run stage 0 first, then stage 1, 2, … in turn.")
    vae = VAE(EMBEDDED_VAE)
    vae.load_state_dict(load_file(path))
    return vae.to(device).eval()


def train_stage(
    folder: Path,
    stage: int,
    *,
    budget: Budget,
    recipe: DemoRecipe,
    device: str = "cpu",
    seed: int = 0,
    report: Report = print,
) -> tuple[DemoModel, Progress]:
    """Train the MMDiT and the text encoders on one stage's mix, starting from what the folder holds."""
    vae = load_trained_vae(folder, device)
    pools = {
        kind: load_pool(
            folder, vae, kind=kind, stage=palette_stage(stage), count=recipe.pool[kind], size=recipe.size, report=report
        )
        for kind in MIXES[stage]
    }
    torch.manual_seed(seed)
    model = DemoModel(recipe.depth).to(device)
    tokenize = Tokenization()

    def loss_of_step(step: int) -> Tensor:
        batch = draw_batch(pools, MIXES[stage], random.Random(f"{seed} {stage} {step}"), recipe)
        return demo_loss(model, tokenize, batch, device)

    progress = train(
        model,
        loss_of_step,
        matrices=model.matrices(),
        settings=recipe.optimizer,
        budget=budget,
        folder=folder,
        phase=f"stage {stage}",
        report=report,
    )
    return model, progress


def palette_stage(stage: int) -> int:
    """The stage whose shapes and colours `stage` uses: they are few until stage 3 and more from stage 4 on."""
    return 4 if stage >= 4 else 3


def load_trained(folder: Path, recipe: DemoRecipe, device: str = "cpu") -> DemoModel:
    """The model of a run with averaged weights, also while it is being trained."""
    model = DemoModel(recipe.depth)
    # The table of positions is not trained, so it has no average and keeps what `DemoModel` gave it.
    model.load_state_dict({"mmdit.pos_embed": model.mmdit.pos_embed, **averaged_weights(folder)})
    return model.to(device).eval()


def look(folder: Path, stage: int, *, recipe: DemoRecipe, device: str = "cpu", count: int = 40) -> None:
    """Write the run's contact sheet and learning curve, as PNG, into its folder."""
    rng = random.Random(f"look {stage}")
    prompts = [caption(sample_scene(rng, stage), rng) for _ in range(count)]
    model, vae = load_trained(folder, recipe, device), load_trained_vae(folder, device)
    pixels = sketch(
        model,
        vae,
        prompts,
        size=recipe.size,
        steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        shift=recipe.shift,
    )
    contact_sheet(to_bytes(pixels), 8, prompts).save(folder / f"sheet-stage-{stage}.png")
    learning_curve(folder).save(folder / "curve.png")


def export_run(folder: Path, tree: Path, *, recipe: DemoRecipe) -> list[Path]:
    """Write the run's model as files for use, see `export`."""
    settings = {
        "name": "Octavo's embedded model",
        "steps": recipe.steps,
        "guidance_scale": recipe.guidance_scale,
        "sampler": "euler",
        "schedule": "simple",
        "shift": recipe.shift,
        "width": recipe.size,
        "height": recipe.size,
    }
    trained_stage = int(json.loads(read_progress(folder / "state.safetensors"))["phase"].removeprefix("stage "))
    model, vae = load_trained(folder, recipe), load_trained_vae(folder)
    return export(model, vae, tree, settings=settings, domain=domain(trained_stage), known=words(trained_stage))


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's data: `latents` [B, 16, h, w], `noise` like them, `sigma` [B], `keep` [B, 3]."""

    captions: list[str]
    latents: Tensor
    noise: Tensor
    sigma: Tensor
    keep: Tensor


def draw_batch(pools: Mapping[str, Pool], mix: Mapping[str, float], rng: random.Random, recipe: DemoRecipe) -> Batch:
    """Scenes by the mix's shares, freshly worded; levels of noise logit-normal."""
    captions, latents = [], []
    kinds = rng.choices(list(mix), list(mix.values()), k=recipe.batch)
    for kind, pool in pools.items():
        rows = [rng.randrange(len(pool.scenes)) for _ in range(kinds.count(kind))]
        latents.append(pool.latents[torch.tensor(rows, dtype=torch.int64)])
        captions += ["" if rng.random() < recipe.empty_captions else caption(pool.scenes[row], rng) for row in rows]
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    clean = torch.cat(latents).float()
    return Batch(
        captions,
        clean,
        torch.randn(clean.shape, generator=generator).to(clean.device),
        shift_sigma(torch.sigmoid(torch.randn(recipe.batch, generator=generator)), recipe.shift),
        (torch.rand(recipe.batch, 3, generator=generator) >= recipe.encoder_dropout).float(),
    )


def demo_loss(model: DemoModel, tokenize: Tokenization, batch: Batch, device: str) -> Tensor:
    """Mean squared error of the velocity, computed with weights and activations in bfloat16.

    Source: Esser et al. 2024 (arXiv 2403.03206): rectified flow with logit-normal timesteps.
    """
    sigma = batch.sigma.to(device)
    level = sigma[:, None, None, None]
    noisy = batch.latents * (1 - level) + batch.noise * level
    low = {name: parameter.bfloat16() for name, parameter in model.named_parameters()}
    inputs = (noisy.bfloat16(), sigma, tokenize(batch.captions).to(device), batch.keep.to(device))
    with short_attention(device):
        velocity = functional_call(model, low, inputs)
    error = velocity.float() - (batch.noise - batch.latents)
    loss: Tensor = (error**2).mean()
    return loss


@contextmanager
def short_attention(device: str) -> Iterator[None]:
    """Attention as two plain products on a CPU: for a hundred tokens four times as fast as the flash kernel."""
    if device != "cpu":
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name it rules the CPU as well
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
