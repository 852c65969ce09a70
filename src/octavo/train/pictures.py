"""Look at a run: pictures of prompts by the model as it stands, contact sheets, and the learning curve as a drawing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from octavo.models.vae import VAE, from_latents
from octavo.sampling.flow import shift_sigma
from octavo.train.model import DemoModel, Tokenization


@torch.no_grad()
def sketch(
    model: DemoModel,
    vae: VAE,
    prompts: Sequence[str],
    *,
    size: int,
    steps: int,
    guidance_scale: float,
    shift: float,
    seed: int = 0,
) -> Tensor:
    """Pictures by plain Euler steps, for a look while training; `octavo.pipeline` is the real thing.

    Returns:
        [B, 3, S, S] near [-1, 1].
    """
    tokenize = Tokenization()
    device = next(model.parameters()).device
    count = len(prompts)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((count, 16, size // 8, size // 8), generator=generator).to(device)
    context, pooled = model.condition(tokenize([*prompts, *[""] * count]).to(device))
    sigmas = shift_sigma(torch.linspace(1, 0, steps + 1), shift)
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        modulation = model.mmdit.modulation(torch.full((2 * count,), 1000 * sigma, device=device), pooled)
        velocity = model.mmdit(torch.cat([latents, latents]), context, modulation)
        wanted, empty = velocity.chunk(2)
        latents = latents + (empty + guidance_scale * (wanted - empty)) * (following - sigma)
    return vae.decode(from_latents(latents))


def contact_sheet(
    pictures: np.ndarray, columns: int, captions: Sequence[str] | None = None, side: int = 0
) -> Image.Image:
    """Pictures [N, S, S, 3] uint8 in rows, each above its caption."""
    size = side or pictures.shape[1]
    margin, text = 6, 26 if captions else 0
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (size + margin) + margin, rows * (size + margin + text) + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x = margin + i % columns * (size + margin)
        y = margin + i // columns * (size + margin + text)
        sheet.paste(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS), (x, y))
        if captions:
            for line, part in enumerate(_wrapped(captions[i], size // 6)[:2]):
                pen.text((x, y + size + 1 + 12 * line), part, fill="black")
    return sheet


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def learning_curve(folder: Path, width: int = 720, height: int = 400) -> Image.Image:
    """The loss of `folder`/curve.jsonl by minutes trained, one colour a phase, the loss on a logarithmic scale."""
    entries = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = 56, 16, width - 16, height - 36
    minutes, offset, before = [], 0.0, 0.0
    for i, entry in enumerate(entries):
        if i and entry["phase"] != entries[i - 1]["phase"]:
            offset += before
        before = entry["seconds"] / 60
        minutes.append(offset + before)
    losses = [math.log10(entry["loss"]) for entry in entries]
    low, longest = min(losses), max(minutes)
    high = max(*losses, low + 1e-3)  # a run just begun has a single loss

    def spot(minute: float, loss: float) -> tuple[float, float]:
        return left + minute / longest * (right - left), bottom - (loss - low) / (high - low) * (bottom - top)

    for i in range(5):
        level = low + (high - low) * i / 4
        x, y = spot(longest * i / 4, level)
        pen.line([(left, y), (right, y)], fill=(225, 225, 225))
        pen.text((8, y - 6), f"{10**level:.3g}", fill="black")
        pen.text((x - 8, bottom + 6), f"{longest * i / 4:.0f}", fill="black")
    pen.text((left, bottom + 20), "minutes of training; loss on a logarithmic scale", fill="black")
    phases = list(dict.fromkeys(entry["phase"] for entry in entries))
    inks = [(36, 92, 224), (222, 44, 44), (36, 160, 72), (132, 56, 180), (248, 140, 20)]
    for n, phase in enumerate(phases):
        ink = inks[n % len(inks)]
        points = [spot(m, v) for m, v, e in zip(minutes, losses, entries, strict=True) if e["phase"] == phase]
        pen.line(points, fill=ink, width=2)
        pen.text((right - 110, top + 14 * n), phase, fill=ink)
    return image
