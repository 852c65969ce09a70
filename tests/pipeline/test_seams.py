"""Tiled decoding has no visible seams: where tiles begin or end, its difference from the whole does not jump."""

import random
from functools import cache

import pytest
import torch
from torch import Tensor

import octavo
from octavo.models import VAE
from octavo.pipeline.decode import decode, encode_image
from octavo.train.drawing import draw
from octavo.train.scenes import sample_scene

SIDE = 384
LEVEL = 2 / 255  # one of 256 levels, in pixels of [-1, 1]


@cache
def vae() -> VAE:
    return octavo.load(device="cpu", dtype="float32").vae()


@cache
def latents() -> Tensor:
    rng = random.Random(2)
    with torch.inference_mode():
        return encode_image(vae(), draw([sample_scene(rng, 5) for _ in range(2)], SIDE))


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
    starts = range(0, SIDE // 8 - overlap, tile - overlap)
    ends = (min(start + tile, SIDE // 8) for start in starts)
    lines = sorted({8 * at for at in (*starts, *ends)} - {0, SIDE})
    at_seams = torch.zeros(SIDE - 1, dtype=torch.bool)
    at_seams[[line - 1 for line in lines]] = True  # between the last pixel of one side and the first of the other
    steps = [error.diff(dim=dim).abs().movedim(dim, 0).flatten(1).mean(1) for dim in (-1, -2)]
    mean = sum(steps, torch.zeros(SIDE - 1)) / 2 / LEVEL
    return error, float(mean[at_seams].mean()), float(mean[~at_seams].mean())


@pytest.mark.parametrize(("tile", "overlap"), [(24, 8), (32, 16)])
def test_at_seams_of_overlapping_tiles_nothing_jumps(tile: int, overlap: int) -> None:
    error, at_seams, elsewhere = errors_and_steps(tile, overlap)
    assert at_seams < 0.25, "a quarter of a level of 256"
    assert at_seams < 2.5 * elsewhere
    assert error.abs().mean() < LEVEL


def test_the_measure_sees_the_seams_of_tiles_that_only_touch() -> None:
    _, at_seams, elsewhere = errors_and_steps(24, 0)
    assert at_seams > 20 * elsewhere
