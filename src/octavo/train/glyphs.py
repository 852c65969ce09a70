"""The capital letters that pictures show, as strokes of one thickness with round ends.

Every letter is drawn here, so that no font's files, licence or version decides what the model learns. Lengths are in
half heights of a letter: it reaches from -1 at its top to 1 at its bottom, y pointing down. Where the letters of a word
stand is `spelling`'s business, turning them into pixels `drawing`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

HALF_WIDTH = 0.72  # of every letter but I and the open round ones, which are narrower
HALF_STROKE = 0.125

Points = npt.NDArray[np.float64]
Line = list[tuple[float, float]]


def letter_distance(letter: str, x: Points, y: Points) -> Points:
    """Distance to the edge of a capital "A" to "Z", negative inside, at points of any shape."""
    best = np.full_like(x, np.inf)
    for line in _STROKES[letter]:
        corners = [(cx * (HALF_WIDTH - HALF_STROKE), cy * (1 - HALF_STROKE)) for cx, cy in line]
        for (ax, ay), (bx, by) in pairwise(corners):
            ex, ey = bx - ax, by - ay
            along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
            best = np.minimum(best, np.hypot(x - ax - along * ex, y - ay - along * ey))
    return best - HALF_STROKE


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float) -> Line:
    """Part of an ellipse between two angles in degrees, from the right (0) over the top (90) to the left (180)."""
    steps = max(4, round(abs(end - start) / 20))
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(cx + rx * math.cos(a), cy - ry * math.sin(a)) for a in angles]


def _bowl(top: float, bottom: float, straight: float) -> Line:
    """From the stem to the right, around, and back to the stem."""
    half = (bottom - top) / 2
    return [(-1, top), *_arc(straight, top + half, 1 - straight, half, 90, -90), (-1, bottom)]


_STEM: Line = [(-1, -1), (-1, 1)]
_P_BOWL = _bowl(-1, 0.1, 0.3)

# Centre lines; ±1 is as far as a stroke's middle may go in either direction.
_STROKES: dict[str, Sequence[Line]] = {
    "A": ([(-1, 1), (0, -1), (1, 1)], [(-0.68, 0.36), (0.68, 0.36)]),
    "B": (_STEM, _bowl(-1, -0.04, 0.2), _bowl(-0.04, 1, 0.3)),
    "C": (_arc(0, 0, 1, 1, 42, 318),),
    "D": (_STEM, _bowl(-1, 1, -0.1)),
    "E": ([(1, -1), (-1, -1), (-1, 1), (1, 1)], [(-1, 0), (0.7, 0)]),
    "F": ([(1, -1), (-1, -1), (-1, 1)], [(-1, 0), (0.7, 0)]),
    "G": ([*_arc(0, 0, 1, 1, 42, 360), (1, 0.1), (0.25, 0.1)],),
    "H": (_STEM, [(1, -1), (1, 1)], [(-1, 0), (1, 0)]),
    "I": ([(0, -1), (0, 1)],),
    "J": ([(1, -1), *_arc(0, 0.4, 1, 0.6, 0, -180)],),
    "K": (_STEM, [(1, -1), (-1, 0.2)], [(-0.4, -0.16), (1, 1)]),
    "L": ([(-1, -1), (-1, 1), (1, 1)],),
    "M": ([(-1, 1), (-1, -1), (0, 0.3), (1, -1), (1, 1)],),
    "N": ([(-1, 1), (-1, -1), (1, 1), (1, -1)],),
    "O": (_arc(0, 0, 1, 1, 0, 360),),
    "P": (_STEM, _P_BOWL),
    "Q": (_arc(0, 0, 1, 1, 0, 360), [(0.2, 0.35), (1, 1)]),
    "R": (_STEM, _P_BOWL, [(0, 0.1), (1, 1)]),
    "S": ([*_arc(0, -0.5, 1, 0.5, 25, 270), *_arc(0, 0.5, 1, 0.5, 90, -155)[1:]],),
    "T": ([(-1, -1), (1, -1)], [(0, -1), (0, 1)]),
    "U": ([(-1, -1), *_arc(0, 0.3, 1, 0.7, 180, 360), (1, -1)],),
    "V": ([(-1, -1), (0, 1), (1, -1)],),
    "W": ([(-1, -1), (-0.6, 1), (0, -0.5), (0.6, 1), (1, -1)],),
    "X": ([(-1, -1), (1, 1)], [(1, -1), (-1, 1)]),
    "Y": ([(-1, -1), (0, 0), (1, -1)], [(0, 0), (0, 1)]),
    "Z": ([(-1, -1), (1, -1), (-1, 1), (1, 1)],),
}
