"""Scenes with their latents: drawn and encoded once, kept in the run's folder, read by every step.

Encoding a picture costs several times what the MMDiT's step on it does; captions are cheap and made afresh each time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.models.vae import VAE, to_latents
from octavo.train.drawing import draw
from octavo.train.loop import Report
from octavo.train.scenes import Scene, jittered, sample_scene


@dataclass(frozen=True, slots=True)
class Pool:
    """Scenes of one kind and their latents [N, 16, h, w] in bfloat16, as the MMDiT sees them."""

    scenes: list[Scene]
    latents: Tensor


def pool_scenes(kind: str, stage: int, count: int, seed: int) -> list[Scene]:
    """The training scenes of one kind, jittered; the same for the same arguments."""
    rng = random.Random(f"{seed} {kind} {stage}")
    return [jittered(sample_scene(rng, stage, kind=kind), rng) for _ in range(count)]


@torch.no_grad()
def load_pool(
    folder: Path,
    vae: VAE,
    *,
    kind: str,
    stage: int,
    count: int,
    size: int,
    seed: int = 0,
    batch: int = 32,
    report: Report = print,
) -> Pool:
    """The pool of one kind, from `folder` or newly encoded there.

    `stage` decides which shapes and colours there are, so a pool belongs to a kind and a stage's palette.
    """
    scenes = pool_scenes(kind, stage, count, seed)
    path = folder / f"latents-{kind}-{stage}-{count}-{size}.safetensors"
    device = next(vae.parameters()).device
    if not path.exists():
        report(f"encoding {count} pictures of kind {kind!r} …")
        parts = []
        for start in range(0, count, batch):
            with torch.autocast(device.type, torch.bfloat16):
                moments = vae.encode(draw(scenes[start : start + batch], size, device))
            parts.append(to_latents(moments[:, :16].float()).bfloat16())
        save_file({"latents": torch.cat(parts).cpu().contiguous()}, path)
    return Pool(scenes, load_file(path)["latents"].to(device))
