"""Scenes to pictures, antialiased, on any device.

Every shape and every letter is a table of signed distances, computed once from its outline; drawing looks distances up,
so that a batch of scenes is a handful of tensor operations and the same code serves CPU and GPU. What to draw is
`scenes`' business, what letters look like that of `glyphs`.

B scenes, S pixels a side, T side of a mark's table; marks are the things of a scene and the letters of its word.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.train.glyphs import letter_distance
from octavo.train.scenes import MORE_SHAPES, PALETTE, Scene, Thing

MARKS = (*MORE_SHAPES, *string.ascii_uppercase)
REACH = 1.5  # a mark's table covers [-REACH, REACH] radii
TABLE = 192

Points = npt.NDArray[np.float64]


def draw(scenes: Sequence[Scene], size: int, device: torch.device | str = "cpu") -> Tensor:
    """Pictures of `scenes`.

    Args:
        scenes: B of them.
        size: pixels a side.
        device: where to draw.

    Returns:
        [B, 3, S, S] float32 in [-1, 1], on `device`.
    """
    axis = (torch.arange(size, device=device) + 0.5) / size
    start = _colours([scene.background for scene in scenes], device)
    end = _colours([scene.background_end or scene.background for scene in scenes], device)
    down = axis[None, None, :, None]
    picture = (start[:, :, None, None] * (1 - down) + end[:, :, None, None] * down).expand(-1, -1, -1, size)
    tables = distance_tables().to(device)
    marks = [_marks(scene) for scene in scenes]
    for layer in range(max(map(len, marks))):
        rows = [i for i, of_scene in enumerate(marks) if len(of_scene) > layer]
        things = [marks[i][layer] for i in rows]
        spots = torch.tensor([(t.x, t.y, t.radius) for t in things], device=device)
        x, y, radius = spots[:, :, None].unbind(1)
        u = ((axis - x) / radius)[:, None, :].expand(-1, size, -1)
        v = ((axis - y) / radius)[:, :, None].expand(-1, -1, size)
        table = tables[[MARKS.index(t.shape) for t in things]][:, None]
        grid = torch.stack([u, v], dim=-1) / REACH
        distance = F.grid_sample(table, grid, padding_mode="border", align_corners=True)
        cover = (0.5 - distance * radius[:, :, None, None] * size).clamp(0, 1)
        colour = _colours([t.colour for t in things], device)[:, :, None, None]
        index = torch.tensor(rows, device=device)
        picture = picture.index_copy(0, index, picture[index] * (1 - cover) + colour * cover)
    return picture.contiguous()


def _marks(scene: Scene) -> list[Thing]:
    """All that is drawn of a scene, each letter as a thing of its own, whose shape is its name."""
    word = scene.word
    letters = [Thing(letter, word.colour, x, word.y, word.radius) for letter, x in word.spots()] if word else []
    return [*scene.things, *letters]


def to_bytes(pixels: Tensor) -> npt.NDArray[np.uint8]:
    """[B, 3, S, S] near [-1, 1] → [B, S, S, 3] uint8."""
    levels: npt.NDArray[np.uint8] = (
        ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    )
    return levels


def _colours(names: Sequence[str], device: torch.device | str) -> Tensor:
    return torch.tensor([PALETTE[name] for name in names], device=device, dtype=torch.float32) / 127.5 - 1


@functools.cache
def distance_tables() -> Tensor:
    """Distance in radii to every outline, negative inside: [marks, T, T], in the order of MARKS."""
    axis = np.linspace(-REACH, REACH, TABLE)
    x, y = np.meshgrid(axis, axis)
    return torch.from_numpy(np.stack([_distance(name, x, y) for name in MARKS])).float()


def _distance(shape: str, x: Points, y: Points) -> Points:
    match shape:
        case "circle":
            return _disc(x, y, 0, 0, 0.95)
        case "ring":
            return np.asarray(np.abs(np.hypot(x, y) - 0.7) - 0.25)
        case "moon":
            # What a second disc leaves of the first; moved so that the crescent stands in the middle.
            return np.maximum(_disc(x, y, 0.2, 0, 1.0), -_disc(x, y, 0.68, 0, 0.86))
        case "cloud":
            discs = ((-0.52, 0.22, 0.43), (0.54, 0.24, 0.41), (-0.14, -0.18, 0.5), (0.3, -0.06, 0.42), (0, 0.3, 0.35))
            return functools.reduce(np.minimum, [_disc(x, y, *disc) for disc in discs])
        case _ if shape.isupper():
            return letter_distance(shape, x, y)
        case _:
            return _polygon_distance(OUTLINES[shape], x, y)


def _disc(x: Points, y: Points, cx: float, cy: float, radius: float) -> Points:
    return np.asarray(np.hypot(x - cx, y - cy) - radius)


def _polygon_distance(corners: Sequence[tuple[float, float]], x: Points, y: Points) -> Points:
    """Distance to a closed polygon, negative inside (even-odd rule)."""
    best = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + ex * (y - ay) / ey)
    return np.where(inside, -best, best)


def _turn(radii: Sequence[float]) -> list[tuple[float, float]]:
    """Corners at equal angles around the middle, the first straight up."""
    angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _heart(steps: int = 64) -> list[tuple[float, float]]:
    """The well-known curve x = 16 sin³ t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled to one radius."""
    corners = []
    for i in range(steps):
        t = 2 * math.pi * i / steps
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        corners.append((x / 16.5, -(y + 2.5) / 16.5))
    return corners


_ARM = 0.33
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)],
    "triangle": [(0, -0.92), (1.0, 0.8), (-1.0, 0.8)],
    "diamond": [(0, -1.05), (0.72, 0), (0, 1.05), (-0.72, 0)],
    "star": _turn([1.08, 0.46] * 5),
    "heart": _heart(),
    "cross": [
        (-_ARM, -0.95), (_ARM, -0.95), (_ARM, -_ARM), (0.95, -_ARM), (0.95, _ARM), (_ARM, _ARM),
        (_ARM, 0.95), (-_ARM, 0.95), (-_ARM, _ARM), (-0.95, _ARM), (-0.95, -_ARM), (-_ARM, -_ARM),
    ],
    "arrow": [(-1.0, -0.3), (0.1, -0.3), (0.1, -0.8), (1.0, 0), (0.1, 0.8), (0.1, 0.3), (-1.0, 0.3)],
    "flower": _turn([0.72 + 0.28 * math.cos(2 * math.pi * 6 * i / 96) for i in range(96)]),
}  # fmt: skip
