"""Tiles leave no visible seams: where they begin or end, their difference from the whole does not jump."""

import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import octavo
from octavo.models import VAE
from octavo.pipeline.decode import blend_tiles, decode, encode_image
from octavo.train.drawing import draw
from octavo.train.scenes import sample_scene

SIDE = 384
LEVEL = 2 / 255  # one of 256 levels, in pixels of [-1, 1]


@cache
def vae() -> VAE:
    return octavo.load(device="cpu", dtype="float32").vae()


@cache
def pixels() -> Tensor:
    rng = random.Random(2)
    return draw([sample_scene(rng, 5) for _ in range(2)], SIDE)


@cache
def latents() -> Tensor:
    with torch.inference_mode():
        return encode_image(vae(), pixels())


@cache
def whole() -> Tensor:
    with torch.inference_mode():
        return decode(vae(), latents())


def errors_and_steps(tile: int, overlap: int) -> tuple[Tensor, float, float]:
    """By how much tiles differ from the whole; how much that changes from a pixel to the next at seams and elsewhere.

    A seam is a line along which the difference jumps. The steps are means, in levels, over both directions.
    """
    with torch.inference_mode():
        error = decode(vae(), latents(), tile=tile, overlap=overlap) - whole()
    at_seams, elsewhere = steps(error, tile, overlap, SIDE)
    return error, at_seams / LEVEL, elsewhere / LEVEL


def encoded_in_tiles(tile: int, overlap: int) -> Tensor:
    """As the node that encodes in tiles does: each latent pixel's pixels are channels."""

    def run(stacked: Tensor) -> Tensor:
        return encode_image(vae(), F.pixel_shuffle(stacked, 8))

    with torch.inference_mode():
        return blend_tiles(run, F.pixel_unshuffle(pixels(), 8), tile=(tile, tile), overlap=overlap, factor=1)


def steps(error: Tensor, tile: int, overlap: int, side: int) -> tuple[float, float]:
    """Mean change from a pixel of [B, C, side, side] to the next, at lines where tiles begin or end, and elsewhere."""
    scale = side // (SIDE // 8)
    starts = range(0, SIDE // 8 - overlap, tile - overlap)
    ends = (min(start + tile, SIDE // 8) for start in starts)
    lines = sorted({scale * at for at in (*starts, *ends)} - {0, side})
    at_seams = torch.zeros(side - 1, dtype=torch.bool)
    at_seams[[line - 1 for line in lines]] = True  # between the last pixel of one side and the first of the other
    changes = [error.diff(dim=dim).abs().movedim(dim, 0).flatten(1).mean(1) for dim in (-1, -2)]
    mean = sum(changes, torch.zeros(side - 1)) / 2
    return float(mean[at_seams].mean()), float(mean[~at_seams].mean())


@pytest.mark.parametrize(("tile", "overlap"), [(24, 8), (32, 16)])
def test_at_seams_of_overlapping_tiles_nothing_jumps(tile: int, overlap: int) -> None:
    error, at_seams, elsewhere = errors_and_steps(tile, overlap)
    assert at_seams < 0.25, "a quarter of a level of 256"
    assert at_seams < 2.5 * elsewhere
    assert error.abs().mean() < LEVEL


def test_the_measure_sees_the_seams_of_tiles_that_only_touch() -> None:
    _, at_seams, elsewhere = errors_and_steps(24, 0)
    assert at_seams > 20 * elsewhere


@pytest.mark.parametrize(("tile", "overlap"), [(24, 8), (32, 16)])
def test_at_seams_of_overlapping_tiles_latents_do_not_jump(tile: int, overlap: int) -> None:
    """In tenths of what latents vary by, a latent pixel being eight wide; in what is decoded from them, in levels."""
    error = encoded_in_tiles(tile, overlap) - latents()
    at_seams, elsewhere = steps(error, tile, overlap, SIDE // 8)
    assert at_seams < 0.1 * float(latents().std())
    assert at_seams < 2.5 * elsewhere
    with torch.inference_mode():
        decoded = decode(vae(), latents() + error) - whole()
    at_seams, elsewhere = (step / LEVEL for step in steps(decoded, tile, overlap, SIDE))
    assert at_seams < 0.25, "a quarter of a level of 256"
    assert at_seams < 3 * elsewhere


def test_the_measure_sees_the_seams_of_encoded_tiles_that_only_touch() -> None:
    at_seams, elsewhere = steps(encoded_in_tiles(24, 0) - latents(), 24, 0, SIDE // 8)
    assert at_seams > 5 * elsewhere
