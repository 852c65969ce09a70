"""Train the judge of the embedded model's pictures: pictures and captions that belong together, against all others.

A step sees families: a scene and neighbours that differ from it in one attribute each, so that telling them apart by
one wrong colour, place or relation is most of the lesson. Half of the pictures are drawings; the others went through
the embedded VAE, whose softness generated pictures share. The network is the caller's (`octavo.evaluate.judge`); scenes
are drawn by lot here, apart from those of the model's training and of its examinations.

B pictures of a step, D width of the features.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from octavo.checkpoint.save import save_safetensors
from octavo.train.captions import caption
from octavo.train.drawing import draw
from octavo.train.loop import Budget, Progress, Report, train
from octavo.train.neighbours import changeable, changed, same_picture
from octavo.train.optimizer import OptimizerSettings
from octavo.train.scenes import Scene, jittered, sample_scene

STAGE = 3  # whose world the judge knows
# What dual encoders learn last, left to chance alone hardly at all: it is in every family that can have it.
HARDEST = ("relation", "binding")

# Pictures [B, 3, S, S] uint8 and their captions → features of both, [B, D] of unit length.
Encode = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]
Reconstruct = Callable[[Tensor], Tensor]  # pixels [B, 3, S, S] in [-1, 1] → the VAE's picture of them


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeRecipe:
    """How the judge is trained; the defaults are those of the judge in the package."""

    side: int = 64  # pixels a side that it sees
    size: int = 128  # pixels a side of pictures that go through the VAE, as the embedded model draws
    batch: int = 256
    family: int = 4  # scenes that differ from the family's first in one attribute each
    pool: int = 2048  # pictures that go through the VAE, once
    reconstructed: float = 0.5  # share of a batch that comes from the pool
    held_out: float = 0.25  # share of scenes that show what the model's training leaves out: a judge is to know it
    unseen: float = 0.25  # share of captions worded in orders that the model's training leaves out
    noise: float = 0.06  # largest std of the noise on the pixels, of their range
    # Inverse temperature. CLIP's grows to 100, at which a wrong attribute would cost hardly any similarity.
    scale: float = 20.0
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(matrix_rate=0.01, other_rate=1e-3))


@dataclass(frozen=True, slots=True)
class Families:
    """Scenes in families, one after the other, and their pictures [B, 3, side, side] uint8."""

    scenes: list[Scene]
    pictures: Tensor


def train_judge(
    judge: nn.Module,
    encode: Encode,
    reconstruct: Reconstruct,
    *,
    matrices: Collection[str],
    folder: Path,
    budget: Budget,
    recipe: JudgeRecipe,
    seed: int = 0,
    report: Report = print,
) -> Progress:
    """Train `judge` in place on one core's worth of drawings; goes on where `folder` stands.

    Args:
        judge: what is trained.
        encode: its features of pictures and captions.
        reconstruct: the embedded VAE, there and back.
        matrices: names of the parameters that Muon updates.
        folder: of the run; keeps the pictures that went through the VAE.
        budget: of the run, over all calls; the VAE's work comes on top.
        recipe: how.
        seed: of the scenes.
        report: gets a line of text now and then.
    """
    pool = load_reconstructions(folder, reconstruct, recipe=recipe, seed=seed, report=report)

    def loss_of_step(step: int) -> Tensor:
        rng = random.Random(f"judge {seed} {step}")
        batch = draw_batch(pool, rng, recipe)
        captions = [say(scene, rng, recipe.unseen) for scene in batch.scenes]
        return contrastive_loss(*encode(batch.pictures, captions), batch.scenes, recipe.scale)

    return train(
        judge,
        loss_of_step,
        matrices=matrices,
        settings=recipe.optimizer,
        budget=budget,
        folder=folder,
        phase="judge",
        report=report,
    )


def contrastive_loss(pictures: Tensor, texts: Tensor, scenes: Sequence[Scene], scale: float) -> Tensor:
    """Cross-entropy of finding every picture's caption and every caption's picture among all of the batch.

    Args:
        pictures: features [B, D] of unit length.
        texts: likewise; row i belongs to picture i.
        scenes: B of them. Where two would give the same picture, neither counts as wrong for the other.
        scale: inverse temperature.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3.
    """
    logits = scale * pictures @ texts.T
    numbers: dict[object, int] = {}
    same = torch.tensor([numbers.setdefault(same_picture(scene), len(numbers)) for scene in scenes])
    twins = (same[:, None] == same) & ~torch.eye(len(scenes), dtype=torch.bool)
    logits = logits.masked_fill(twins.to(logits.device), float("-inf"))
    target = torch.arange(len(scenes), device=logits.device)
    loss: Tensor = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss


def draw_batch(pool: Families, rng: random.Random, recipe: JudgeRecipe) -> Families:
    """One step's scenes and pictures: families of the pool, and newly drawn ones, all with a little noise."""
    family = recipe.family
    from_pool = round(recipe.batch * recipe.reconstructed / family)
    starts = [family * rng.randrange(len(pool.scenes) // family) for _ in range(from_pool)]
    rows = [start + i for start in starts for i in range(family)]
    new = sample_families(rng, recipe.batch // family - from_pool, recipe)
    drawn = to_uint8(draw([jittered(scene, rng) for scene in new], recipe.side))
    pictures = torch.cat([pool.pictures[rows], drawn])
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    strength = recipe.noise * 255 * torch.rand((len(pictures), 1, 1, 1), generator=generator)
    noisy = pictures + strength * torch.randn(pictures.shape, generator=generator)
    return Families([*(pool.scenes[row] for row in rows), *new], noisy.round().clamp(0, 255).byte())


def sample_families(rng: random.Random, count: int, recipe: JudgeRecipe) -> list[Scene]:
    """`count` families, one after the other: a scene and those that differ from it in one attribute each."""
    scenes = []
    for _ in range(count):
        first = sample_scene(rng, STAGE, held_out=rng.random() < recipe.held_out)
        attributes = list(changeable(first))
        rng.shuffle(attributes)
        attributes.sort(key=lambda attribute: attribute not in HARDEST)
        scenes += [first, *(changed(first, attribute, rng) for attribute in attributes[: recipe.family - 1])]
    return scenes


def say(scene: Scene, rng: random.Random, unseen: float) -> str:
    """A caption of `scene`, in an order unknown to the model's training with a chance of `unseen`."""
    return caption(scene, rng, unseen=scene.says_background and rng.random() < unseen)


@torch.no_grad()
def load_reconstructions(
    folder: Path, reconstruct: Reconstruct, *, recipe: JudgeRecipe, seed: int, report: Report, batch: int = 32
) -> Families:
    """Families and the VAE's pictures of them, from `folder` or made anew there."""
    rng = random.Random(f"judge {seed} reconstructions")
    scenes = sample_families(rng, recipe.pool // recipe.family, recipe)
    shown = [jittered(scene, rng) for scene in scenes]
    path = folder / f"reconstructions-{seed}-{len(scenes)}-{recipe.size}.safetensors"
    if not path.exists():
        report(f"taking {len(scenes)} pictures through the VAE …")
        parts = []
        for start in range(0, len(shown), batch):
            pixels = reconstruct(draw(shown[start : start + batch], recipe.size)).clamp(-1, 1)
            parts.append(to_uint8(F.interpolate(pixels, (recipe.side,) * 2, mode="bilinear", antialias=True)))
        save_safetensors(path, {"pictures": torch.cat(parts)})
    return Families(scenes, load_file(path)["pictures"])


def to_uint8(pixels: Tensor) -> Tensor:
    """[B, 3, S, S] in [-1, 1] → the same as uint8 levels."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
