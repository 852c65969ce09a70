"""The world the embedded model knows: what a picture may show, and how people say it.

A `Scene` is everything a picture shows; `sample_scene` draws one of a stage, `caption` words it. The prompt decides
the picture: whatever a caption leaves out has a fixed value here (a star is yellow, a background is white), because a
small model learns what the words determine and stays at chance on what they do not. Stages widen the world step by
step; each contains the ones before it.

Some pairs of shape and colour, some words to show, and some ways of wording, are kept out of training (`is_held_out`,
`spelling.KEPT_OUT_WORDS`, `held_out=True`), so that `octavo.evaluate` can ask for what the model has never seen.
Drawing is in `drawing`; nothing here imports torch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

from octavo.train.spelling import LONGEST_WORD, SHORTEST_WORD, Word, fitting_radius, sample_word

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring", "moon", "arrow")
MORE_SHAPES = (*SHAPES, "flower", "cloud")  # from stage 4 on

# One palette for things and backgrounds: flat, friendly, and far enough apart to be told by eye and by the checker.
PALETTE: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (222, 44, 44),
        "orange": (248, 140, 20),
        "yellow": (252, 220, 50),
        "green": (36, 160, 72),
        "blue": (36, 92, 224),
        "purple": (132, 56, 180),
        "pink": (252, 150, 196),
        "white": (250, 250, 250),
        "black": (20, 20, 24),
        "gray": (136, 140, 148),
        "brown": (122, 74, 36),
        "cyan": (60, 204, 220),
    }
)
COLOURS = tuple(PALETTE)[:10]
MORE_COLOURS = tuple(PALETTE)  # from stage 4 on

NATURAL_COLOUR = MappingProxyType(
    {
        "circle": "red",
        "square": "blue",
        "triangle": "green",
        "star": "yellow",
        "heart": "red",
        "diamond": "purple",
        "cross": "black",
        "ring": "orange",
        "moon": "yellow",
        "arrow": "black",
        "flower": "pink",
        "cloud": "gray",
    }
)

PLACES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "center": (0, 0),
        "left": (-1, 0),
        "right": (1, 0),
        "top": (0, -1),
        "bottom": (0, 1),
        "top left": (-1, -1),
        "top right": (1, -1),
        "bottom left": (-1, 1),
        "bottom right": (1, 1),
    }
)
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene; lengths are fractions of the picture's side, y points down."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a picture shows, and the part of it that a caption must say.

    `kind` is one of "single", "pair", "several", "word", "word and thing". `place`, `size` and `relation` are None
    where the caption is to leave them out; `says_background` and `says_colour` are false where the fixed value is
    shown unsaid. With a word, `relation` is that of the thing to it and `says_colour` speaks of its letters.
    """

    kind: str
    things: tuple[Thing, ...]
    background: str
    background_end: str | None = None  # a gradient from `background` at the top to this at the bottom
    place: str | None = None
    size: str | None = None
    relation: str | None = None
    says_background: bool = True
    says_colour: bool = True
    word: Word | None = None


def is_held_out(shape: str, colour: str) -> bool:
    """Whether this pair is kept out of training: one colour of every shape, one shape of every colour."""
    return (MORE_SHAPES.index(shape) + MORE_COLOURS.index(colour)) % 10 == 3


def default_background(colour: str) -> str:
    """What a picture stands on when its caption does not say: white, or black under a white thing."""
    return "black" if colour == "white" else "white"


# ── where things stand ────────────────────────────────────────────────────────────────────────────────────────────
SPOT = MappingProxyType({"large": 0.25, "small": 0.32})  # distance of a named place from the middle
RADIUS_AT_CENTER = MappingProxyType({"large": 0.36, "small": 0.16})
RADIUS_AT_PLACE = MappingProxyType({"large": 0.21, "small": 0.12})
PAIR_SPOT, PAIR_RADIUS = 0.24, 0.2
WORD_SPOT, WORD_BY_THING_RADIUS = 0.3, 0.115
THING_BY_WORD_SPOT, THING_BY_WORD_RADIUS = 0.17, 0.25
LETTERS_COLOUR = "black"  # of a word whose caption names none
JITTER = 0.006  # of the side: enough that a picture is not one fixed array, too little to be worth learning


def single_thing(shape: str, colour: str, place: str, size: str) -> Thing:
    """A thing at one of PLACES, "small" or "large"."""
    dx, dy = PLACES[place]
    radius = (RADIUS_AT_CENTER if place == "center" else RADIUS_AT_PLACE)[size]
    return Thing(shape, colour, 0.5 + dx * SPOT[size], 0.5 + dy * SPOT[size], radius)


def pair_of_things(first: tuple[str, str], second: tuple[str, str], relation: str) -> tuple[Thing, Thing]:
    """Two things, each given as shape and colour; `first` is left of, right of, above or below `second`."""
    dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[relation]
    return (
        Thing(*first, 0.5 + dx * PAIR_SPOT, 0.5 + dy * PAIR_SPOT, PAIR_RADIUS),
        Thing(*second, 0.5 - dx * PAIR_SPOT, 0.5 - dy * PAIR_SPOT, PAIR_RADIUS),
    )


SEVERAL: Mapping[int, tuple[tuple[tuple[float, float], ...], float]] = MappingProxyType(
    {
        2: (((0.26, 0.5), (0.74, 0.5)), 0.2),
        3: (((0.5, 0.27), (0.26, 0.72), (0.74, 0.72)), 0.18),
        4: (((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)), 0.18),
    }
)


def jittered(scene: Scene, rng: random.Random) -> Scene:
    """The same scene with every thing, and the word as a whole, moved and resized by about half a pixel."""
    things = tuple(_jittered(thing, rng) for thing in scene.things)
    return replace(scene, things=things, word=_jittered(scene.word, rng) if scene.word else None)


Mark = TypeVar("Mark", Thing, Word)


def _jittered(mark: Mark, rng: random.Random) -> Mark:
    return replace(
        mark,
        x=mark.x + rng.uniform(-JITTER, JITTER),
        y=mark.y + rng.uniform(-JITTER, JITTER),
        radius=mark.radius * rng.uniform(0.985, 1.015),
    )


# ── drawing scenes by lot ─────────────────────────────────────────────────────────────────────────────────────────
def _pick(rng: random.Random, held_out: bool, stage: int) -> tuple[str, str]:
    """A shape and a colour; of the kept-out pairs if `held_out`, else of the others."""
    shapes, colours = (MORE_SHAPES, MORE_COLOURS) if stage >= 4 else (SHAPES, COLOURS)
    while True:
        shape, colour = rng.choice(shapes), rng.choice(colours)
        if is_held_out(shape, colour) == held_out:
            return shape, colour


def _background(rng: random.Random, colours: Sequence[str], stage: int) -> str:
    palette = MORE_COLOURS if stage >= 4 else COLOURS
    return rng.choice([name for name in palette if name not in colours])


def _sample_single(rng: random.Random, stage: int, held_out: bool, *, placed: bool) -> Scene:
    shape, colour = _pick(rng, held_out, stage)
    says_colour = held_out or rng.random() > 0.06
    if not says_colour:
        colour = NATURAL_COLOUR[shape]
        if is_held_out(shape, colour):
            return _sample_single(rng, stage, held_out, placed=placed)
    says_background = rng.random() > 0.12
    background = _background(rng, [colour], stage) if says_background else default_background(colour)
    place = size = None
    if placed:
        place = rng.choice([None, *PLACES])
        size = rng.choice([None, "small", "large"]) if place else rng.choice(["small", "large"])
    thing = single_thing(shape, colour, place or "center", size or "large")
    return Scene(
        "single",
        (thing,),
        background,
        place=place,
        size=size,
        says_background=says_background,
        says_colour=says_colour,
    )


def _sample_pair(rng: random.Random, stage: int, held_out: bool) -> Scene:
    first, second = _pick(rng, held_out, stage), _pick(rng, False, stage)
    if rng.random() < 0.5:
        first, second = second, first
    if first == second:
        return _sample_pair(rng, stage, held_out)
    relation = rng.choice(RELATIONS)
    says_background = rng.random() > 0.2
    background = _background(rng, [first[1], second[1]], stage)
    if not says_background:
        background = "white"
        if "white" in (first[1], second[1]):
            return _sample_pair(rng, stage, held_out)
    return Scene(
        "pair",
        pair_of_things(first, second, relation),
        background,
        relation=relation,
        says_background=says_background,
    )


def _sample_several(rng: random.Random, stage: int, held_out: bool) -> Scene:
    shape, colour = _pick(rng, held_out, stage)
    spots, radius = SEVERAL[rng.choice([2, 3, 4])]
    says_background = rng.random() > 0.12
    background = _background(rng, [colour], stage) if says_background else default_background(colour)
    things = tuple(Thing(shape, colour, x, y, radius) for x, y in spots)
    return Scene("several", things, background, says_background=says_background)


def _sample_gradient(rng: random.Random, stage: int, held_out: bool) -> Scene:
    shape, colour = _pick(rng, held_out, stage)
    top = _background(rng, [colour], stage)
    bottom = _background(rng, [colour, top], stage)
    return Scene("single", (single_thing(shape, colour, "center", "large"),), top, background_end=bottom)


def _sample_word(rng: random.Random, stage: int, held_out: bool) -> Scene:
    text = sample_word(rng, held_out=held_out)
    says_colour = rng.random() > 0.1
    colour = rng.choice(MORE_COLOURS) if says_colour else LETTERS_COLOUR
    says_background = rng.random() > 0.15
    return Scene(
        "word",
        (),
        _background(rng, [colour], stage) if says_background else default_background(colour),
        says_background=says_background,
        says_colour=says_colour,
        word=Word(text, colour, 0.5, 0.5, fitting_radius(text)),
    )


def _sample_word_and_thing(rng: random.Random, stage: int, held_out: bool) -> Scene:
    shape, thing_colour = _pick(rng, held_out, stage)
    text = sample_word(rng, held_out=held_out)
    says_colour = rng.random() > 0.3
    colour = rng.choice(MORE_COLOURS) if says_colour else LETTERS_COLOUR
    says_background = rng.random() > 0.3
    background = _background(rng, [thing_colour, colour], stage) if says_background else "white"
    if background in (thing_colour, colour):
        return _sample_word_and_thing(rng, stage, held_out)
    relation = rng.choice(("above", "below"))
    side = 1 if relation == "above" else -1
    return Scene(
        "word and thing",
        (Thing(shape, thing_colour, 0.5, 0.5 - side * THING_BY_WORD_SPOT, THING_BY_WORD_RADIUS),),
        background,
        relation=relation,
        says_background=says_background,
        says_colour=says_colour,
        word=Word(text, colour, 0.5, 0.5 + side * WORD_SPOT, fitting_radius(text, WORD_BY_THING_RADIUS)),
    )


# Share of each kind of scene in a stage's mix: the newest most, the earlier ones kept alive.
MIXES: Mapping[int, Mapping[str, float]] = MappingProxyType(
    {
        1: {"plain": 1.0},
        2: {"plain": 0.3, "placed": 0.7},
        3: {"plain": 0.2, "placed": 0.35, "pair": 0.45},
        4: {"plain": 0.15, "placed": 0.25, "pair": 0.35, "several": 0.15, "gradient": 0.1},
        5: {
            "plain": 0.06, "placed": 0.12, "pair": 0.18, "several": 0.08, "gradient": 0.06,
            "word": 0.3, "word and thing": 0.2,
        },
    }
)  # fmt: skip


def sample_scene(rng: random.Random, stage: int, *, held_out: bool = False, kind: str | None = None) -> Scene:
    """A scene of `stage`'s mix, things exactly on their spots.

    Args:
        rng: source of chance.
        stage: 1 to 5, as in `MIXES`.
        held_out: show a pair of shape and colour, and a word, that training never shows, instead of never showing one.
        kind: of the mix's kinds, this one only.
    """
    mix = MIXES[stage]
    kind = kind or rng.choices(list(mix), list(mix.values()))[0]
    if kind == "pair":
        return _sample_pair(rng, stage, held_out)
    if kind == "several":
        return _sample_several(rng, stage, held_out)
    if kind == "gradient":
        return _sample_gradient(rng, stage, held_out)
    if kind == "word":
        return _sample_word(rng, stage, held_out)
    if kind == "word and thing":
        return _sample_word_and_thing(rng, stage, held_out)
    return _sample_single(rng, stage, held_out, placed=kind == "placed")


def domain(stage: int) -> str:
    """In words for people, what a model trained up to `stage` can draw."""
    shapes, colours = (MORE_SHAPES, MORE_COLOURS) if stage >= 4 else (SHAPES, COLOURS)
    parts = [f"one flat {_listed(shapes)}, in {_listed(colours)}, on a background of another of these colours"]
    if stage >= 2:
        parts.append(f"large or small, at one of {len(PLACES)} places (the center, the sides, the corners)")
    if stage >= 3:
        parts.append("or two such things, one left of, right of, above or below the other")
    if stage >= 4:
        parts.append("or two, three or four of a kind, or one on a gradient from one colour to another")
    if stage >= 5:
        parts.append(
            f"or a word of {SHORTEST_WORD} to {LONGEST_WORD} capitals in one of these colours, alone or above "
            "or below a thing"
        )
    return "Draws " + "; ".join(parts) + ". Knows no other things and no other words."


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
