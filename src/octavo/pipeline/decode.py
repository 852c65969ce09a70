"""Latents to pixels, whole or in tiles when memory is short; and pixels to latents, for pictures that start a run."""

import logging
from collections.abc import Callable
from itertools import pairwise, product
from typing import cast

import torch
from torch import Tensor

from octavo.devices import out_of_memory, trim_memory
from octavo.models.vae import VAE, from_latents, to_latents

logger = logging.getLogger(__name__)

TILE, OVERLAP = 64, 16  # latent pixels: 512 and 128 pixels of the picture


def decode(vae: VAE, latents: Tensor, *, tile: int | None = None, overlap: int = OVERLAP) -> Tensor:
    """Picture of what the MMDiT made.

    Args:
        vae: decodes in its own dtype.
        latents: [B, 16, h, w], as the MMDiT sees them.
        tile: side of the tiles in latent pixels; None decodes in one piece.
        overlap: latent pixels that neighbouring tiles share.

    Returns:
        [B, 3, 8h, 8w] float32 in [-1, 1].
    """
    z = from_latents(latents.float()).to(next(vae.parameters()).dtype)
    if tile is None:
        return vae.decode(z).float().clamp(-1, 1)
    pixels = blend_tiles(vae.decode, z, tile=(tile, tile), overlap=overlap, factor=vae.config.factor)
    return pixels.clamp(-1, 1)


def decode_as_fits(vae: VAE, latents: Tensor, *, tile: int | None = None, overlap: int = OVERLAP) -> Tensor:
    """`decode`; where memory does not suffice in tiles, and at last in small ones.

    Whole means exact, by rows where a picture is large (`models.rows`). Tiles change a picture a little, so they come
    last, or where they are asked for.
    """
    ladder = [(tile, overlap), (TILE, OVERLAP), (TILE // 2, OVERLAP // 2)]
    for (side, shared), (smaller, _) in pairwise(ladder):
        try:
            return decode(vae, latents, tile=side, overlap=shared)
        except Exception as error:
            if not out_of_memory(error):
                raise
            how = "whole" if side is None else f"in tiles of {side * vae.config.factor} pixels"
            pixels = " x ".join(str(length * vae.config.factor) for length in reversed(latents.shape[-2:]))
            logger.warning(
                "Memory does not suffice to decode %s pixels %s; next come smaller tiles, of %d pixels.",
                *(pixels, how, cast(int, smaller) * vae.config.factor),
            )
        trim_memory()
    side, shared = ladder[-1]
    return decode(vae, latents, tile=side, overlap=shared)


def encode_image(vae: VAE, pixels: Tensor) -> Tensor:
    """Latents of a picture, as the MMDiT sees them: the mean of the VAE's distribution, nothing drawn.

    Args:
        vae: encodes in its own dtype.
        pixels: [B, 3, H, W] in [-1, 1], sides divisible by 8.

    Returns:
        [B, 16, H/8, W/8] float32.
    """
    moments = vae.encode(pixels.to(next(vae.parameters()).dtype))
    mean, _ = moments.float().chunk(2, dim=1)
    return to_latents(mean)


def to_uint8(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] → [B, H, W, 3] uint8, rounded to the nearest level."""
    return (pixels.movedim(1, -1) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def blend_tiles(
    run: Callable[[Tensor], Tensor], x: Tensor, *, tile: tuple[int, int], overlap: int, factor: int
) -> Tensor:
    """Apply `run` to overlapping tiles and cross-fade them linearly.

    Args:
        run: [B, C, t, u] → [B, c, t·factor, u·factor].
        x: [B, C, h, w].
        tile: height and width of a tile, in pixels of `x`; at least overlap + 1.
        overlap: pixels of `x` that neighbours share.
        factor: how much larger the result is.

    Returns:
        [B, c, h·factor, w·factor] float32; one tile that covers everything gives `run(x)` itself.
    """
    rows, columns = (_spans(size, side, overlap) for size, side in zip(x.shape[-2:], tile, strict=True))
    if len(rows) == len(columns) == 1:
        return run(x).float()
    total = weights = torch.empty(0)
    for (top, height), (left, width) in product(rows, columns):
        out = run(x[:, :, top : top + height, left : left + width]).float()
        fade = _fade(height * factor, overlap * factor)[:, None] * _fade(width * factor, overlap * factor)[None, :]
        fade = fade.to(out.device)
        if not total.numel():
            total = out.new_zeros(*out.shape[:2], x.shape[2] * factor, x.shape[3] * factor)
            weights = total.new_zeros(total.shape[-2:])
        place = (slice(top * factor, (top + height) * factor), slice(left * factor, (left + width) * factor))
        total[..., *place] += out * fade
        weights[place] += fade
    return total / weights


def _spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, length) of the tiles along one side; the last may be shorter."""
    if size <= tile:
        return [(0, size)]
    return [(start, min(tile, size - start)) for start in range(0, size - overlap, tile - overlap)]


def _fade(length: int, overlap: int) -> Tensor:
    """Weights [length] that rise over the first `overlap` pixels and fall over the last ones."""
    if overlap >= length:
        return torch.ones(length)
    ramp = torch.arange(1, overlap + 1) / max(overlap, 1)
    fade = torch.ones(length)
    fade[:overlap] *= ramp
    fade[length - overlap :] *= ramp.flip(0)
    return fade
