"""Read the letters of a word: split a line by its empty columns, compare each part with the capitals as they are drawn.

What is a line of letters and what a thing is decided in `checker`; here are covers, [S, S] between 0 for background and
1 for ink.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from octavo.train.drawing import draw
from octavo.train.glyphs import HALF_WIDTH
from octavo.train.scenes import Scene
from octavo.train.spelling import Word

Array = npt.NDArray[np.float64]

ROWS, COLUMNS = 32, 24  # of the patch in which letters are compared
MARGIN = 1.1  # of that patch around a letter
INK = 0.35  # cover from which a column belongs to a letter
UNREADABLE = "?"
ALIKE = 0.6  # least correlation of what counts as a letter at all


def split_columns(cover: Array) -> list[tuple[int, int]]:
    """First column, and the one after the last, of every part of a line that empty columns divide."""
    inked = np.concatenate([[False], cover.max(axis=0) > INK, [False]])
    edges = np.flatnonzero(inked[1:] != inked[:-1])
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def read_line(cover: Array, parts: Sequence[tuple[int, int]], top: float, bottom: float) -> str:
    """The letters of a line, from left to right.

    Args:
        cover: [S, S], ink of this line only.
        parts: columns of each letter, as `split_columns` gives them.
        top: row where the line begins.
        bottom: row after its last.

    Returns:
        As many characters as there are parts; `UNREADABLE` for what resembles no letter.
    """
    patches = np.stack([_patch(cover, (first + end) / 2, top, bottom) for first, end in parts])
    likeness = np.einsum("nrc,mrc->nm", patches, _templates())
    return "".join(string.ascii_uppercase[int(row.argmax())] if row.max() >= ALIKE else UNREADABLE for row in likeness)


def _patch(cover: Array, middle: float, top: float, bottom: float) -> Array:
    """A letter's surroundings [ROWS, COLUMNS] with mean 0 and norm 1, so that products are correlations."""
    radius = MARGIN * (bottom - top) / 2
    y = (top + bottom) / 2 + (2 * (np.arange(ROWS) + 0.5) / ROWS - 1) * radius - 0.5
    x = middle + (2 * (np.arange(COLUMNS) + 0.5) / COLUMNS - 1) * radius * HALF_WIDTH - 0.5
    patch = ndimage.map_coordinates(cover, np.meshgrid(y, x, indexing="ij"), order=1, mode="constant")
    patch = patch - patch.mean()
    return np.asarray(patch / max(float(np.linalg.norm(patch)), 1e-6))


@functools.cache
def _templates() -> Array:
    """The patches of all capitals [26, ROWS, COLUMNS], drawn white on black."""
    size, radius = 96, 0.3
    scenes = [Scene("word", (), "black", word=Word(a, "white", 0.5, 0.5, radius)) for a in string.ascii_uppercase]
    red = draw(scenes, size)[:, 0].double().numpy()
    low, high = red.min(), red.max()
    patches = []
    for cover in (red - low) / (high - low):
        ((first, end),) = split_columns(cover)
        patches.append(_patch(cover, (first + end) / 2, (0.5 - radius) * size, (0.5 + radius) * size))
    return np.stack(patches)
