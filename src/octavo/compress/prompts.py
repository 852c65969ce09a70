"""Prompts to calibrate on: built-in ones, the embedded model's own, or the user's.

The last `GATE` built-in ones are never calibrated on: they are what the result is judged by. None of all these is asked
in examinations or reports.
"""

import random
from importlib.resources import files
from pathlib import Path

from octavo.errors import RequestError

GATE = 8
_SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring", "moon", "arrow")
_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "gray")
_PLACES = (
    "in the center", "at the top", "at the bottom", "on the left", "on the right",
    "in the top left corner", "in the top right corner", "in the bottom left corner", "in the bottom right corner",
)  # fmt: skip
_RELATIONS = ("left of", "right of", "above", "below")


def calibration_prompts(count: int, *, embedded: bool) -> list[str]:
    """The first `count` prompts to calibrate on.

    Args:
        count: from 1; of those for real models there are 128, which come again with other noise.
        embedded: whether the model is of the embedded one's kind, which knows flat shapes and their colours only.
    """
    every = _of_shapes("calibration", count) if embedded else _builtin()[:-GATE]
    return [every[i % len(every)] for i in range(count)]


def gate_prompts(count: int, *, embedded: bool) -> list[str]:
    """`count` prompts to judge by; beyond the built-in ones they come again, with other noise."""
    every = _of_shapes("gate", count) if embedded else _builtin()[-GATE:]
    return [every[i % len(every)] for i in range(count)]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        RequestError: it cannot be read, or has none.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise RequestError(f"Cannot read the prompts of '{path}': {error}.") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise RequestError(f"There is no prompt in '{path}' to calibrate on; write one a line.")
    return prompts


def _builtin() -> list[str]:
    return files("octavo.compress").joinpath("prompts.txt").read_text("utf-8").splitlines()


def _of_shapes(purpose: str, count: int) -> list[str]:
    """Different prompts in the embedded model's words: one thing somewhere, or two side by side."""
    rng = random.Random(f"compress {purpose}")
    found = dict[str, None]()
    while len(found) < count:
        background, *colours = rng.sample(_COLOURS, 3)
        first, second = rng.sample(_SHAPES, 2)
        thing = f"{_article(colours[0])} {colours[0]} {first}"
        if rng.random() < 0.4:
            other = f"{_article(colours[1])} {colours[1]} {second}"
            what = f"{thing} {rng.choice(_RELATIONS)} {other}"
        else:
            size = rng.choice(("a large", "a small", ""))
            what = f"{size} {colours[0]} {first}" if size else thing
            what += f" {rng.choice(_PLACES)}" if rng.random() < 0.6 else ""
        found[f"{what} on {_article(background)} {background} background"] = None
    return list(found)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
