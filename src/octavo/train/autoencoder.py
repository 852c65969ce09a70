"""Train the embedded VAE: good reconstructions, and latents that an MMDiT finds easy.

The latents are held near mean 0 and variance 1 by channel while decoding sees them through a little noise, so that no
fine detail hides in them; at the end the exact statistics are folded into the encoder's last convolution, and SD3's own
shift and scale hold for this VAE too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from octavo.models.vae import SCALE, SHIFT, VAE, VAEConfig
from octavo.train.drawing import draw
from octavo.train.loop import Budget, Report, train
from octavo.train.optimizer import OptimizerSettings
from octavo.train.scenes import MORE_COLOURS, MORE_SHAPES, Scene, Thing
from octavo.train.spelling import Word, sample_word

EMBEDDED_VAE = VAEConfig(channels=(32, 48, 64, 64), layers_per_block=1, groups=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderRecipe:
    """How the VAE is trained."""

    size: int = 64  # pixels a side
    batch: int = 32
    large_share: float = 0.25  # of the steps that see pictures of twice the side instead, a quarter as many
    noise: float = 0.2  # std of the noise on latents of std 1 that the decoder learns to see through
    unit_weight: float = 0.02  # of the pull of every channel towards mean 0 and variance 1
    gradient_weight: float = 0.5  # of the error of differences between neighbouring pixels: crisp edges
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(matrix_rate=0.01, other_rate=1e-3))


def new_vae() -> VAE:
    """The embedded VAE with fresh weights: every residual branch begins at zero, so that depth costs nothing."""
    vae = VAE(EMBEDDED_VAE)
    for name, parameter in vae.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight", "bias")):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 4:
            torch.nn.init.orthogonal_(parameter)
    return vae


def random_scene(rng: random.Random) -> Scene:
    """Anything the drawing code can show, anywhere and at any size: the VAE is to be free of the captions' habits."""
    gradient = rng.random() < 0.2
    things = tuple(
        Thing(
            rng.choice(MORE_SHAPES),
            rng.choice(MORE_COLOURS),
            rng.uniform(0, 1),
            rng.uniform(0, 1),
            rng.choice([rng.uniform(0.12, 0.4), rng.uniform(0.2, 0.8)]),
        )
        for _ in range(rng.choice([1, 1, 2, 2, 3, 4]))
    )
    word = None
    if rng.random() < 0.25:
        middle = (rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8))
        word = Word(sample_word(rng), rng.choice(MORE_COLOURS), *middle, rng.uniform(0.1, 0.2))
    return Scene("single", things, rng.choice(MORE_COLOURS), rng.choice(MORE_COLOURS) if gradient else None, word=word)


def train_autoencoder(
    folder: Path,
    *,
    budget: Budget,
    recipe: AutoencoderRecipe,
    phase: str = "vae",
    device: str = "cpu",
    seed: int = 0,
    report: Report = print,
) -> VAE:
    """Train (or go on training) the VAE of the run in `folder`; returns it with averaged weights, not yet folded."""
    torch.manual_seed(seed)
    vae = new_vae().to(device)

    def loss_of_step(step: int) -> Tensor:
        rng = random.Random(f"{seed} {phase} {step}")
        factor = 2 if rng.random() < recipe.large_share else 1
        scenes = [random_scene(rng) for _ in range(recipe.batch // factor**2)]
        pixels = draw(scenes, recipe.size * factor, device)
        generator = torch.Generator(device).manual_seed(rng.getrandbits(62))
        return autoencoder_loss(vae, pixels, generator, recipe)

    matrices = {name for name, p in vae.named_parameters() if p.ndim == 4 and p.shape[0] > 3 and p.shape[1] > 3}
    train(
        vae,
        loss_of_step,
        matrices=matrices,
        settings=recipe.optimizer,
        budget=budget,
        folder=folder,
        phase=phase,
        report=report,
    )
    return vae


def autoencoder_loss(vae: VAE, pixels: Tensor, generator: torch.Generator, recipe: AutoencoderRecipe) -> Tensor:
    """Error of the pixels and of their differences, and of the latents' statistics."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        latents = vae.encode(pixels)[:, :16].float()
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        seen = (latents + recipe.noise * noise) / SCALE + SHIFT
        out = vae.decode(seen).float()
    error = out - pixels
    across, down = error.diff(dim=3), error.diff(dim=2)
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
    unit = (mean**2 + variance - 1 - torch.log(variance + 1e-6)).mean()
    return (
        error.abs().mean()
        + 2 * (error**2).mean()
        + recipe.gradient_weight * (across.abs().mean() + down.abs().mean())
        + recipe.unit_weight * unit
    )


@torch.no_grad()
def fold_statistics(vae: VAE, batches: Callable[[int], Tensor], *, noise: float, count: int = 16) -> None:
    """Make (z - 0.0609) · 1.5305 have mean 0 and std 1 by channel, by rewriting the encoder's last convolution.

    Args:
        vae: as trained: its encoder gives normalised latents, its decoder reads `from_latents` of them.
        batches: pictures by number, as the MMDiT will see them.
        noise: std of the posterior in units of the latents, written as a constant log-variance.
        count: batches to measure.
    """
    latents = torch.cat([vae.encode(batches(i))[:, :16] for i in range(count)])
    std, mean = (t.float() for t in torch.std_mean(latents.double(), dim=(0, 2, 3)))
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    assert last.bias is not None
    assert first.bias is not None
    last.weight[:16] /= (std * SCALE)[:, None, None, None]
    last.bias[:16] = (last.bias[:16] - mean) / (std * SCALE) + SHIFT
    last.weight[16:] = 0
    last.bias[16:] = 2 * math.log(noise / SCALE)
    # The decoder was given latents / SCALE + SHIFT, and is now given (latents - mean) / std / SCALE + SHIFT.
    offset = SHIFT * (1 - std) + mean / SCALE
    first.bias += (first.weight * offset[:, None, None]).sum(dim=(1, 2, 3))
    first.weight *= std[:, None, None]
