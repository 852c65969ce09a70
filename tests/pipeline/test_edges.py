"""Edges against OpenCV's; what they must be is tested with the Canny node."""

import importlib
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.evaluate.edges import edge_agreement
from octavo.pipeline.edges import canny
from octavo.train.controlnet import lesson_scene
from octavo.train.drawing import draw


def test_edges_are_those_of_opencv_to_the_pixel_beside() -> None:
    """Both smooth by the same 5x5 bell and threshold the same gradients; OpenCV does it on whole numbers."""
    cv2 = importlib.import_module("cv2")  # of the extra dev; untyped
    rng = random.Random(5)
    pictures = (draw([lesson_scene(rng) for _ in range(12)], 256) + 1) / 2

    def theirs(picture: Tensor) -> Tensor:
        levels = (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        grey = cv2.GaussianBlur(cv2.cvtColor(levels, cv2.COLOR_RGB2GRAY), (5, 5), 1.0)
        return torch.from_numpy(cv2.Canny(grey, 0.4 * 255, 0.8 * 255, L2gradient=True) / 255).float()[None]

    found, expected = canny(pictures, 0.4, 0.8), torch.stack([theirs(picture) for picture in pictures])
    assert edge_agreement(found, expected, within=1).min() == 1
    assert edge_agreement(found, expected, within=0).mean() > 0.98


def test_agreement_is_one_for_the_same_edges_and_counts_what_is_missed_and_what_is_made_up() -> None:
    """Of two lines one is found: precision 1, recall a half, so F1 is two thirds; likewise the other way round."""
    one, two = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
    one[..., 8, :] = two[..., 8, :] = two[..., 24, :] = 1
    moved = two.roll(2, dims=-2)
    assert edge_agreement(two, two).item() == 1
    assert edge_agreement(moved, two).item() == 1
    assert edge_agreement(two.roll(3, dims=-2), two).item() == 0
    assert edge_agreement(one, two).item() == pytest.approx(2 / 3)
    assert edge_agreement(two, one).item() == pytest.approx(2 / 3)
    assert edge_agreement(torch.zeros_like(one), one).item() == 0
