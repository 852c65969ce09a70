"""Read a picture back: its background, the shape, colour, place and size of everything on it, and a word if it has one.

The background is what the border shows, things are what differs from it; colours are the nearest of the palette, and
shapes are told by a small classifier trained on the VAE's reconstructions of drawings (`train_classifier`), so that a
picture is judged by what it shows and not by the VAE's softness. Letters are read in `lettering`. `judge` compares a
reading with the scene asked for.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn

from octavo.evaluate.lettering import read_line, split_columns
from octavo.train.drawing import draw, to_bytes
from octavo.train.scenes import MORE_COLOURS, MORE_SHAPES, PALETTE, Scene, Thing
from octavo.train.spelling import SHORTEST_WORD, Word

Picture = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]

SIDE = 24  # of the masks that the classifier sees
THRESHOLD = 38.0  # distance in RGB from which a pixel is no background; the palette's closest pair is 85 apart
SMALLEST = 0.004  # of the picture's area: smaller spots are not counted
ATTRIBUTES = ("background", "count", "colour", "shape", "place", "size", "word")


@dataclass(frozen=True, slots=True)
class Reading:
    """What the checker sees; lengths in fractions of the side, as in `Scene`. `radius` is half the longer extent."""

    background: str
    background_end: str
    things: tuple[Thing, ...]
    word: Word | None = None


class ShapeClassifier(nn.Module):
    """Masks [N, SIDE·SIDE] in [0, 1] → scores of MORE_SHAPES [N, shapes]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(SIDE * SIDE, 48)
        self.scores = nn.Linear(48, len(MORE_SHAPES))

    def forward(self, masks: Tensor) -> Tensor:
        out: Tensor = self.scores(F.relu(self.hidden(masks - 0.5)))
        return out


def load_classifier(path: Path | None = None) -> ShapeClassifier:
    """The classifier of the package, or that of `path`."""
    classifier = ShapeClassifier()
    if path is None:
        with as_file(files("octavo.embedded") / "checker.safetensors") as packaged:
            weights = load_file(packaged)
    else:
        weights = load_file(path)
    classifier.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return classifier.eval()


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Spot:
    """Something that is not background: its soft mask [SIDE, SIDE], its mean colour, its place, its cover [S, S]."""

    mask: Array
    colour: Array
    x: float
    y: float
    radius: float
    half_height: float
    cover: Array


def read(picture: Picture, classifier: ShapeClassifier) -> Reading:
    """What `picture` [S, S, 3] shows."""
    background, spots = find_spots(picture)
    word, spots = find_word(spots)
    names: list[str] = []
    if spots:
        with torch.no_grad():
            masks = torch.from_numpy(np.stack([spot.mask for spot in spots])).float()
            names = [MORE_SHAPES[i] for i in classifier(masks.flatten(1)).argmax(dim=1).tolist()]
    things = tuple(
        Thing(name, nearest_colour(spot.colour), spot.x, spot.y, spot.radius)
        for name, spot in zip(names, spots, strict=True)
    )
    return Reading(nearest_colour(background[0]), nearest_colour(background[-1]), things, word)


def find_spots(picture: Picture) -> tuple[Array, list[Spot]]:
    """The background by row [S, 3], and everything that stands before it."""
    pixels = picture.astype(np.float64)
    size = len(pixels)
    background = _background(pixels)
    difference = np.linalg.norm(pixels - background[:, None], axis=2)
    labels, count = ndimage.label(difference > THRESHOLD)
    spots = []
    for label in range(1, count + 1):
        inside = labels == label
        if inside.sum() < SMALLEST * size * size:
            continue
        # The middle of the thing, away from its antialiased edge, says its colour.
        strong = inside & (difference >= 0.8 * np.percentile(difference[inside], 90))
        colour = np.median(pixels[strong], axis=0)
        away = colour - background
        cover = ((pixels - background[:, None]) * away[:, None]).sum(axis=2) / (away**2).sum(axis=1)[:, None]
        cover = np.where(ndimage.binary_dilation(inside, iterations=1), cover.clip(0, 1), 0)
        spots.append(_spot(cover, colour))
    return background, spots


def _background(pixels: Array) -> Array:
    """The background's colour by row [S, 3]: of the border's most frequent colour, a ramp if top and bottom differ."""
    size = len(pixels)
    edge = max(2, size // 40)
    top, bottom = _most_frequent(pixels[:edge].reshape(-1, 3)), _most_frequent(pixels[-edge:].reshape(-1, 3))
    sides = np.concatenate([pixels[:, :edge], pixels[:, -edge:]], axis=1)
    whole = _most_frequent(
        np.concatenate([sides.reshape(-1, 3), pixels[:edge].reshape(-1, 3), pixels[-edge:].reshape(-1, 3)])
    )
    if np.linalg.norm(top - bottom) < THRESHOLD:
        return np.broadcast_to(whole, (size, 3)).copy()
    ramp = np.linspace(0, 1, size)[:, None]
    graded = top * (1 - ramp) + bottom * ramp
    # A thing that touches the top or the bottom looks like a ramp there; the sides decide.
    middle = np.median(sides[size // 3 : 2 * size // 3].reshape(-1, 3), axis=0)
    is_ramp = np.linalg.norm(middle - (top + bottom) / 2) < np.linalg.norm(middle - whole)
    return graded if is_ramp else np.broadcast_to(whole, (size, 3)).copy()


def _most_frequent(colours: Array) -> Array:
    """The median of those pixels whose nearest palette colour is the most frequent one."""
    nearest = _distances(colours).argmin(axis=1)
    return np.asarray(np.median(colours[nearest == np.bincount(nearest).argmax()], axis=0))


def _distances(colours: Array) -> Array:
    palette = np.array([PALETTE[name] for name in MORE_COLOURS], dtype=np.float64)
    return np.asarray(np.linalg.norm(colours[:, None] - palette, axis=2))


def nearest_colour(colour: Array) -> str:
    """Name of the palette's colour nearest to an RGB triple."""
    return MORE_COLOURS[int(_distances(colour[None])[0].argmin())]


def _spot(cover: Array, colour: Array) -> Spot:
    size = len(cover)
    rows, columns = np.flatnonzero(cover.max(axis=1) > 0.5), np.flatnonzero(cover.max(axis=0) > 0.5)
    if not len(rows):
        rows = columns = np.arange(size)
    y, x = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    radius = max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1) / 2
    steps = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    at = np.meshgrid(y + steps * radius * 1.1 - 0.5, x + steps * radius * 1.1 - 0.5, indexing="ij")
    mask = ndimage.map_coordinates(cover, at, order=1, mode="constant")
    half_height = (rows[-1] - rows[0] + 1) / 2
    return Spot(np.asarray(mask), colour, x / size, y / size, radius / size, half_height / size, cover)


def find_word(spots: Sequence[Spot]) -> tuple[Word | None, list[Spot]]:
    """The word among the spots, if there is one, and all spots that are not part of it.

    A word is a line of at least `SHORTEST_WORD` parts in one colour, most of them equally tall; things never stand so.
    """
    for tall in spots:
        line = [spot for spot in spots if _in_line_with(tall, spot)]
        cover = np.max([spot.cover for spot in line], axis=0)
        parts = split_columns(cover)
        equally_tall = [spot for spot in line if spot.half_height > 0.85 * tall.half_height]
        if len(parts) < SHORTEST_WORD or 2 * len(equally_tall) <= len(parts):
            continue
        size = len(cover)
        y = float(np.median([spot.y for spot in equally_tall]))
        radius = float(np.median([spot.half_height for spot in equally_tall]))
        text = read_line(cover, parts, (y - radius) * size, (y + radius) * size)
        middle = (parts[0][0] + parts[-1][1]) / 2 / size
        word = Word(text, nearest_colour(tall.colour), middle, y, radius)
        return word, [spot for spot in spots if not _in_line_with(tall, spot)]
    return None, list(spots)


def _in_line_with(tall: Spot, spot: Spot) -> bool:
    same_colour = nearest_colour(spot.colour) == nearest_colour(tall.colour)
    return same_colour and abs(spot.y - tall.y) + spot.half_height < 1.3 * tall.half_height


# ── judging ───────────────────────────────────────────────────────────────────────────────────────────────────────
def judge(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Whether each of ATTRIBUTES is as the scene has it, and "all" of them.

    Every thing asked for is compared in shape and colour with one thing seen, in the pairing that fits best. `place`
    asks that a thing stands on every spot, and that no other pairing of things and spots fits their shapes and colours
    better; `size` that every thing is nearer to its own size than to the other. `word` is about its letters; its
    colour, place and size are asked for together with those of the things.
    """
    wanted, found = scene.things, reading.things
    verdict = dict.fromkeys(ATTRIBUTES, False)
    verdict["background"] = reading.background == scene.background and reading.background_end == (
        scene.background_end or scene.background
    )
    verdict["count"] = len(wanted) == len(found)
    verdict["word"] = (scene.word and scene.word.text) == (reading.word and reading.word.text)
    if verdict["count"]:
        pairings = list(itertools.permutations(found))
        nearest = min(pairings, key=lambda pairing: sum(map(_apart, wanted, pairing)))
        # The nearer of equally alike pairings: exchanged colours are wrong colours, and not things in wrong places.
        best = max(pairings, key=lambda p: (_alike(wanted, p), -sum(map(_apart, wanted, p))))
        verdict["colour"] = all(w.colour == f.colour for w, f in zip(wanted, best, strict=True))
        verdict["shape"] = all(w.shape == f.shape for w, f in zip(wanted, best, strict=True))
        on_their_spots = all(a < 0.1 for a in map(_apart, wanted, nearest))
        verdict["place"] = on_their_spots and _alike(wanted, nearest) == _alike(wanted, best)
        verdict["size"] = all(0.72 < f.radius / expected_extent(w) < 1.39 for w, f in zip(wanted, nearest, strict=True))
    if scene.word:
        asked, seen = scene.word, reading.word
        verdict["colour"] &= seen is not None and seen.colour == asked.colour
        verdict["place"] &= seen is not None and float(np.hypot(seen.x - asked.x, seen.y - asked.y)) < 0.1
        verdict["size"] &= seen is not None and 0.72 < seen.radius / asked.radius < 1.39
    verdict["all"] = all(verdict.values())
    return verdict


def expected_extent(thing: Thing) -> float:
    """Half the longer side of the box around a thing."""
    tall = {"moon": 1.0, "diamond": 1.05, "triangle": 1.0, "square": 0.84, "heart": 0.97}
    return thing.radius * tall.get(thing.shape, 0.97)


def _apart(a: Thing, b: Thing) -> float:
    return float(np.hypot(a.x - b.x, a.y - b.y))


def _alike(wanted: Sequence[Thing], found: Sequence[Thing]) -> int:
    """In how many shapes and colours the things of two lists agree, one by one."""
    return sum((a.shape == b.shape) + (a.colour == b.colour) for a, b in zip(wanted, found, strict=True))


# ── training the classifier ───────────────────────────────────────────────────────────────────────────────────────
def train_classifier(
    reconstruct: Callable[[Tensor], Tensor], *, size: int, pictures: int = 800, steps: int = 600, seed: int = 1
) -> ShapeClassifier:
    """Learn the shapes from drawings that went through the VAE, and from some that did not.

    Args:
        reconstruct: pixels [B, 3, S, S] → the VAE's reconstruction of them.
        size: S, pixels a side.
        pictures: drawings of four things each; drawn for this purpose only.
        steps: of AdamW.
        seed: of drawings and weights.
    """
    rng = random.Random(f"checker {seed}")
    masks, shapes = [], []
    for start in range(0, pictures, 16):
        scenes = [_practice(rng) for _ in range(16)]
        drawn = draw(scenes, size)
        for pixels in [reconstruct(drawn)] if start % 64 else [drawn]:
            for scene, picture in zip(scenes, to_bytes(pixels), strict=True):
                for spot in find_spots(picture)[1]:
                    owner = min(scene.things, key=lambda t: np.hypot(t.x - spot.x, t.y - spot.y))
                    masks.append(spot.mask)
                    shapes.append(MORE_SHAPES.index(owner.shape))
    torch.manual_seed(seed)
    classifier = ShapeClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    x, y = torch.from_numpy(np.stack(masks)).float().flatten(1), torch.tensor(shapes)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(x), (256,), generator=generator)
        loss = F.cross_entropy(classifier(x[rows] + 0.05 * torch.randn(256, SIDE * SIDE, generator=generator)), y[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
    return classifier.eval()


def _practice(rng: random.Random) -> Scene:
    """Four things, or one large one, in any shapes and colours."""
    background = rng.choice(MORE_COLOURS)
    colours = [name for name in MORE_COLOURS if name != background]
    spots: Sequence[tuple[float, float, float]] = [(0.5, 0.5, rng.uniform(0.15, 0.4))]
    if rng.random() < 0.7:
        spots = [(x, y, rng.uniform(0.1, 0.21)) for x in (0.26, 0.74) for y in (0.26, 0.74)]
    things = tuple(
        Thing(
            rng.choice(MORE_SHAPES), rng.choice(colours), x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02), r
        )
        for x, y, r in spots
    )
    return Scene("single", things, background)
