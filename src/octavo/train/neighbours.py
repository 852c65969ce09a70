"""Scenes that differ from a given one in exactly one attribute: what a judge of pictures must not mistake for it.

Made for stages 1 to 3, one thing or a pair of things before a flat background.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import replace

from octavo.train.scenes import COLOURS, PLACES, RELATIONS, SHAPES, Scene, Thing, pair_of_things, single_thing

# "binding" exchanges the colours of a pair: the same words, joined otherwise.
ATTRIBUTES = ("background", "colour", "shape", "place", "size", "relation", "binding")


def changeable(scene: Scene) -> tuple[str, ...]:
    """Those of ATTRIBUTES in which `scene` can be changed."""
    if scene.kind == "single":
        return ("background", "colour", "shape", "place", "size")
    first, second = scene.things
    differ = first.colour != second.colour and first.shape != second.shape
    return ("background", "colour", "shape", "relation", *(["binding"] if differ else []))


def changed(scene: Scene, attribute: str, rng: random.Random) -> Scene:
    """`scene` with another value of `attribute`, one of `changeable(scene)`, and nothing left unsaid in its captions.

    Things stand exactly on their spots, as `sample_scene` gives them.
    """
    # What is unsaid has a fixed value, which may be that of the old scene only.
    scene = replace(scene, says_background=True, says_colour=True)
    colours, shapes = [t.colour for t in scene.things], [t.shape for t in scene.things]
    index = rng.randrange(len(scene.things))
    match attribute:
        case "background":
            return replace(scene, background=_other(COLOURS, [scene.background, *colours], rng))
        case "colour":
            thing = replace(scene.things[index], colour=_other(COLOURS, [scene.background, *colours], rng))
            return replace(scene, things=_with(scene.things, index, thing))
        case "shape":
            thing = replace(scene.things[index], shape=_other(SHAPES, shapes, rng))
            return replace(scene, things=_with(scene.things, index, thing))
        case "place":
            place = _other(PLACES, [scene.place or "center"], rng)
            return replace(scene, things=(_moved(scene.things[0], place, scene.size or "large"),), place=place)
        case "size":
            size = _other(("large", "small"), [scene.size or "large"], rng)
            return replace(scene, things=(_moved(scene.things[0], scene.place or "center", size),), size=size)
        case "relation":
            assert scene.relation is not None
            return _related(scene, scene.things, _other(RELATIONS, [scene.relation], rng))
        case _:
            assert attribute == "binding", f"'{attribute}' is none of {ATTRIBUTES}"
            assert scene.relation is not None
            a, b = scene.things
            exchanged = (replace(a, colour=b.colour), replace(b, colour=a.colour))
            return _related(scene, exchanged, scene.relation)


def same_picture(scene: Scene) -> tuple[object, ...]:
    """A key that two scenes share if their pictures are the same, however their captions are worded."""
    things = sorted((t.shape, t.colour, round(t.x, 3), round(t.y, 3), round(t.radius, 3)) for t in scene.things)
    return (scene.background, scene.background_end, scene.word, *things)


def _other(names: Iterable[str], taken: Collection[str], rng: random.Random) -> str:
    return rng.choice([name for name in names if name not in taken])


def _with(things: tuple[Thing, ...], index: int, thing: Thing) -> tuple[Thing, ...]:
    return (*things[:index], thing, *things[index + 1 :])


def _moved(thing: Thing, place: str, size: str) -> Thing:
    return single_thing(thing.shape, thing.colour, place, size)


def _related(scene: Scene, things: tuple[Thing, ...], relation: str) -> Scene:
    first, second = ((t.shape, t.colour) for t in things)
    return replace(scene, things=pair_of_things(first, second, relation), relation=relation)
