"""Weights that the recorded runs of other implementations were made with: generated, not stored.

The rule is written in the `weight_recipe` / `recipe` / `weights` entries of the goldens: every tensor is drawn from a
generator seeded with the CRC-32 of its key.
"""

import json
import math
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor


def _normal(key: str, shape: list[int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(crc32(key.encode())))


def mmdit_weights(description: Path) -> dict[str, Tensor]:
    """Float32 weights of `mmdit_*_tiny.json`, by key without prefix; each is a float16 number, as the files hold."""

    def draw(key: str, shape: list[int]) -> Tensor:
        r = _normal(key, shape)
        if "ln_q" in key or "ln_k" in key:
            return 1 + 0.2 * r
        if key == "pos_embed":
            return 0.3 * r
        if key.endswith("bias"):
            return 0.05 * r
        gain = 0.6 if "adaLN" in key else 1.0
        return gain * r / math.sqrt(math.prod(shape[1:]))

    shapes = json.loads(description.read_text())["shapes"]
    return {key: draw(key, shape).half().float() for key, shape in shapes.items()}


def vae_weights(description: Path) -> dict[str, Tensor]:
    """Float32 weights of `vae.json`, the full-size VAE, by key without prefix."""

    def draw(key: str, shape: list[int]) -> Tensor:
        r = _normal(key, shape)
        if "norm" in key:
            return 1 + 0.1 * r if key.endswith("weight") else 0.05 * r
        return 0.05 * r if key.endswith("bias") else r / math.sqrt(math.prod(shape[1:]))

    shapes = json.loads(description.read_text())["shapes"]
    return {key: draw(key, shape) for key, shape in shapes.items()}


def text_encoder_weights(description: Path, encoder: str) -> dict[str, Tensor]:
    """Float32 weights of one encoder of `text_encoders.json` (clip_l, clip_g or t5xxl), by key without prefix."""

    def draw(key: str, shape: list[int]) -> Tensor:
        r = _normal(key, shape)
        if "norm" in key:
            return 1 + 0.1 * r if key.endswith("weight") else 0.05 * r
        if key.endswith("bias"):
            return 0.05 * r
        if "relative_attention_bias" in key:
            return 0.5 * r
        if encoder == "t5xxl":
            gain = 0.35 if ".q." in key else 1.0
            return r if key.endswith("shared.weight") else gain * r / math.sqrt(shape[1])
        if "embedding" in key:
            return (0.02 if "position" in key else 0.05) * r
        return r / math.sqrt(math.prod(shape[1:]))

    shapes = json.loads(description.read_text())["shapes"]
    mine = {key: shape for key, shape in shapes.items() if key.startswith(f"{encoder}.")}
    return {key.removeprefix(f"{encoder}."): draw(key, shape) for key, shape in mine.items()}
