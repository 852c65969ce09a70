"""How people say what a picture shows: captions of scenes, and the words they are made of.

Every scene can be worded in thousands of ways, short ("red star on blue") and long. Some orders of the parts, such as
the background first, are used only with `unseen=True`: they ask a trained model for wordings that it was never shown.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from octavo.train.scenes import COLOURS, MORE_COLOURS, MORE_SHAPES, SHAPES, Scene, Thing
from octavo.train.spelling import Word

# Words, of which every letter of a word in capitals is one; with a start and an end token, at most 20 positions.
LONGEST = 18

_SHAPE_WORDS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "circle": ("circle", "circle", "circle", "disc", "dot", "ball"),
        "square": ("square", "square", "square", "box"),
        "diamond": ("diamond", "diamond", "diamond", "rhombus"),
        "cross": ("cross", "cross", "plus"),
        "ring": ("ring", "ring", "ring", "donut"),
        "moon": ("moon", "moon", "crescent"),
    }
)
_COLOUR_WORDS: Mapping[str, Sequence[str]] = MappingProxyType(
    {"gray": ("gray", "grey"), "purple": ("purple", "purple", "violet"), "cyan": ("cyan", "turquoise")}
)
_SIZE_WORDS = MappingProxyType(
    {"large": ("large", "large", "big", "huge"), "small": ("small", "small", "little", "tiny")}
)
_OPENINGS = (
    "a picture of", "an image of", "a drawing of", "a photo of", "a painting of", "picture of", "drawing of", "draw",
    "there is", "an icon of", "show", "a simple drawing of",
)  # fmt: skip
_ADJECTIVES = (
    "simple",
    "flat",
    "nice",
    "pretty",
    "beautiful",
    "bright",
    "plain",
    "single",
    "cute",
    "cool",
    "shiny",
    "perfect",
)
_PLURALS = MappingProxyType({"cross": "crosses", "plus": "pluses", "box": "boxes", "rhombus": "rhombuses"})
_NUMBERS = MappingProxyType({2: ("two", "2", "a pair of"), 3: ("three", "3"), 4: ("four", "4")})
_LINKS = (
    "a an the one in on at of to with and is that against over under near next beside",
    "left right top bottom upper lower center centre middle corner side background above below beneath",
)
# For captions about words, from stage 5 on; counted from stage 4 on, for a vocabulary cannot grow once a model is
# trained on it. The letters themselves come with the tokenizer.
_LETTERING = ("it its by word text letters writing says saying written reads",)
_UNKNOWN = "unfamiliar"  # a word outside the vocabulary: the model learns to pass over such


def words(stage: int = 4) -> list[str]:
    """Every word that a caption can hold up to `stage`, sorted; the vocabulary is that of the last stage."""
    more = stage >= 4
    shapes = [word for shape in (MORE_SHAPES if more else SHAPES) for word in _SHAPE_WORDS.get(shape, (shape,))]
    colours = [word for colour in (MORE_COLOURS if more else COLOURS) for word in _COLOUR_WORDS.get(colour, (colour,))]
    phrases = [
        *shapes, *colours, *_ADJECTIVES, *_OPENINGS, *_LINKS,
        *(word for size in _SIZE_WORDS.values() for word in size),
    ]  # fmt: skip
    if more:
        numbers = [number for options in _NUMBERS.values() for number in options]
        phrases += [*(_plural(word) for word in shapes), *numbers, *_LETTERING, "gradient to from"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def caption(scene: Scene, rng: random.Random, *, unseen: bool = False) -> str:
    """One way of saying what `scene` shows, at most `LONGEST` words long.

    Args:
        scene: what to say; what it marks as unsaid is left out.
        rng: source of chance.
        unseen: word it in an order that is never used in training; the scene must say its background.
    """
    while True:
        text = " ".join(_caption(scene, rng, unseen=unseen).split())
        if not unseen and rng.random() < 0.04:
            parts = text.split()
            parts.insert(rng.randrange(len(parts) + 1), _UNKNOWN)
            text = " ".join(parts)
        if length(text) <= LONGEST:
            return text


def length(text: str) -> int:
    """Tokens of a caption: one for every word, and one for every letter of a word in capitals."""
    return sum(len(word) if word.isupper() else 1 for word in text.split())


def _caption(scene: Scene, rng: random.Random, *, unseen: bool) -> str:
    background = _background(scene, rng) if scene.says_background else ""
    what = _what(scene, rng)
    place = _place(scene.place, rng) if scene.place else ""
    opening = rng.choice(_OPENINGS) if rng.random() < 0.25 else ""
    if unseen:
        return _unseen_order(scene, what, place, background, rng)
    chance = rng.random()
    if background and scene.background_end is None and chance < 0.16:
        colour = _colour(scene.background, rng)
        if chance < 0.08:
            return f"{opening} {_article(colour, rng)} background with {what} {place}"
        if chance < 0.12:
            return (
                f"{opening} {what} {place} and {rng.choice([f'the background is {colour}', f'a {colour} background'])}"
            )
        return f"{opening} {_article(colour, rng)} background and {what} {place}"
    if background and chance < 0.26:
        return f"{opening} {background} {what} {place}"
    if place and chance < 0.36:
        return f"{opening} {place} {what} {background}"
    if place and chance < 0.5:
        return f"{opening} {what} {background} {place}"
    return f"{opening} {what} {place} {background}"


def _unseen_order(scene: Scene, what: str, place: str, background: str, rng: random.Random) -> str:
    """Orders kept out of training: the opening in the middle, the background as a clause at the beginning."""
    orders = [f"{background} there is {what} {place}"]
    if scene.background_end is None:
        orders.append(f"the background is {_colour(scene.background, rng)} with {what} {place}")
    if place:
        orders.append(f"{place} there is {what} {background}")
    return rng.choice(orders)


def _what(scene: Scene, rng: random.Random) -> str:
    if scene.word and not scene.things:
        return _word(scene.word, rng, says_colour=scene.says_colour)
    thing = scene.things[0]
    if scene.word:
        word = _word(scene.word, rng, says_colour=scene.says_colour)
        return _word_and_thing(word, _thing(thing, rng), scene.relation == "above", rng)
    if scene.kind == "several":
        number = rng.choice(_NUMBERS[len(scene.things)])
        return f"{number} {_colour(thing.colour, rng)} {_plural(_shape(thing.shape, rng))}"
    if scene.kind == "pair" and scene.relation:
        return _pair(scene.things[0], scene.things[1], scene.relation, rng)
    return _thing(thing, rng, size=scene.size, says_colour=scene.says_colour)


def _thing(thing: Thing, rng: random.Random, *, size: str | None = None, says_colour: bool = True) -> str:
    shape = _shape(thing.shape, rng)
    colour = _colour(thing.colour, rng) if says_colour else ""
    adjective = rng.choice(_ADJECTIVES) if rng.random() < 0.05 else ""
    before = f"{adjective} {rng.choice(_SIZE_WORDS[size]) if size else ''}"
    if colour and rng.random() < 0.05:
        return _article(f"{before} {shape} {rng.choice(['in', 'that is'])} {colour}", rng)
    return _article(f"{before} {colour} {shape}", rng)


def _pair(first: Thing, second: Thing, relation: str, rng: random.Random) -> str:
    a, b = _thing(first, rng), _thing(second, rng)
    match relation:
        case "left of":
            link = rng.choice(
                ["left of", "to the left of", "on the left of", "left of", "next to", "beside", "and", "and"]
            )
            if rng.random() < 0.1:
                return f"{a} on the left and {b} on the right"
        case "right of":
            link = rng.choice(["right of", "to the right of", "on the right of"])
            if rng.random() < 0.1:
                return f"{a} on the right and {b} on the left"
        case "above":
            link = rng.choice(["above", "above", "over", "on top of"])
            if rng.random() < 0.1:
                return f"{a} at the top and {b} at the bottom"
        case _:
            link = rng.choice(["below", "below", "under", "beneath"])
            if rng.random() < 0.1:
                return f"{a} at the bottom and {b} at the top"
    return f"{a} {link} {b}"


def _word(word: Word, rng: random.Random, *, says_colour: bool) -> str:
    colour = _colour(word.colour, rng) if says_colour else ""
    chance = rng.random()
    if chance < 0.4:
        noun = rng.choice(("word", "word", "text", "letters"))
        inside, after = (f"{colour} {noun}", "") if rng.random() < 0.4 else (noun, f"in {colour}" if colour else "")
        return f"{rng.choice(('the', 'the', 'the', ''))} {inside} {word.text} {after}"
    if chance < 0.55:
        verb = rng.choice(("that says", "that reads", "saying"))
        return f"{rng.choice(('a', 'the', ''))} {colour} text {verb} {word.text}"
    if chance < 0.8:
        return f"{word.text} {f'in {colour}' if colour else ''}"
    end = rng.choice((f"in {colour} letters", f"written in {colour}")) if colour else "in letters"
    return f"{rng.choice(('', 'the word'))} {word.text} {end}"


def _word_and_thing(word: str, thing: str, thing_above: bool, rng: random.Random) -> str:
    upper, lower = (thing, word) if thing_above else (word, thing)
    if rng.random() < 0.15:
        return f"{upper} at the top and {lower} at the bottom"
    if rng.random() < 0.5:
        return f"{upper} {rng.choice(['above', 'above', 'over', 'on top of'])} {lower}"
    return f"{lower} {rng.choice(['below', 'below', 'under', 'beneath'])} {upper}"


def _background(scene: Scene, rng: random.Random) -> str:
    colour = _colour(scene.background, rng)
    if scene.background_end:
        end = _colour(scene.background_end, rng)
        return rng.choice([f"on a {colour} to {end} gradient", f"on a gradient from {colour} to {end}"])
    backed = _article(f"{colour} background", rng)
    return rng.choice(
        [f"on {backed}", f"on {backed}", f"on {colour}", f"against {backed}", f"with {backed}", f"{colour} background"]
    )


def _place(place: str, rng: random.Random) -> str:
    if place == "center":
        return f"{rng.choice(['in', 'in', 'at'])} the {rng.choice(['center', 'middle', 'centre'])}"
    if " " in place:
        down, across = place.split()
        if rng.random() < 0.3:
            down = {"top": "upper", "bottom": "lower"}[down]
        corner = rng.choice(["", "corner"])
        return f"{rng.choice(['in', 'at', 'in'])} the {down} {across} {corner}"
    if place in ("left", "right"):
        return f"{rng.choice(['on', 'on', 'at', 'to'])} the {place} {rng.choice(['', '', 'side'])}"
    return f"{rng.choice(['at', 'at', 'near', 'on'])} the {place}"


def _article(phrase: str, rng: random.Random) -> str:
    phrase = " ".join(phrase.split())
    article = rng.choices(["a", "the", "one", ""], [0.78, 0.06, 0.03, 0.13])[0]
    if article == "a" and phrase[0] in "aeiou":
        article = "an"
    return f"{article} {phrase}".strip()


def _shape(shape: str, rng: random.Random) -> str:
    return rng.choice(_SHAPE_WORDS.get(shape, (shape,)))


def _colour(colour: str, rng: random.Random) -> str:
    return rng.choice(_COLOUR_WORDS.get(colour, (colour,)))


def _plural(word: str) -> str:
    return _PLURALS.get(word, f"{word}s")
