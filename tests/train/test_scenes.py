"""The world, its words and its pictures: the caption decides the picture."""

import random

import pytest
import torch

from octavo.text.words import word_level_tokenizer
from octavo.train.captions import LONGEST, caption, words
from octavo.train.drawing import draw, to_bytes
from octavo.train.scenes import (
    COLOURS,
    MIXES,
    MORE_COLOURS,
    MORE_SHAPES,
    PALETTE,
    SHAPES,
    Scene,
    Thing,
    domain,
    is_held_out,
    jittered,
    sample_scene,
)

STAGES = tuple(MIXES)


def scenes(stage: int, count: int, *, held_out: bool = False) -> list[Scene]:
    rng = random.Random(f"test {stage}")
    return [sample_scene(rng, stage, held_out=held_out) for _ in range(count)]


@pytest.mark.parametrize("stage", STAGES)
def test_training_never_shows_a_kept_out_pair_and_examinations_always_do(stage: int) -> None:
    for scene in scenes(stage, 500):
        assert not any(is_held_out(t.shape, t.colour) for t in scene.things)
    for scene in scenes(stage, 500, held_out=True):
        assert any(is_held_out(t.shape, t.colour) for t in scene.things)


def test_every_shape_and_every_colour_has_a_kept_out_partner() -> None:
    pairs = [(s, c) for s in SHAPES for c in COLOURS if is_held_out(s, c)]
    assert {s for s, _ in pairs} == set(SHAPES)
    assert {c for _, c in pairs} == set(COLOURS)
    assert len(pairs) == len(SHAPES)


@pytest.mark.parametrize("stage", STAGES)
def test_things_never_vanish_into_the_background_or_leave_the_picture(stage: int) -> None:
    for scene in scenes(stage, 500):
        for thing in scene.things:
            assert thing.colour not in (scene.background, scene.background_end)
            assert all(
                0 < edge < 1 for centre in (thing.x, thing.y) for edge in (centre - thing.radius, centre + thing.radius)
            )


@pytest.mark.parametrize("stage", STAGES)
def test_a_caption_decides_the_picture(stage: int) -> None:
    """Two scenes that can be worded alike are alike: nothing that a caption leaves out varies."""
    rng = random.Random(0)
    shown: dict[str, Scene] = {}
    for scene in scenes(stage, 4000):
        text = caption(scene, rng)
        plain = Scene("", scene.things, scene.background, scene.background_end)
        assert shown.setdefault(text, plain) == plain, text


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_captions_are_short_and_made_of_known_words(stage: int, unseen: bool) -> None:
    tokenizer = word_level_tokenizer(words(), letters=True)
    rng = random.Random(1)
    for scene in [s for s in scenes(stage, 400) if s.says_background]:
        text = caption(scene, rng, unseen=unseen)
        assert 0 < len(text.split()) <= LONGEST
        unknown = [t for t in tokenizer.encode(text).tokens if t == "<unknown>"]
        assert not unknown or "unfamiliar" in text


def test_unseen_wordings_are_never_used_in_training() -> None:
    rng = random.Random(2)
    known = {caption(scene, rng) for scene in scenes(3, 3000)}
    unseen = {caption(scene, rng, unseen=True) for scene in scenes(3, 3000) if scene.says_background}
    assert not known & unseen


def test_drawing_is_deterministic_and_alike_alone_and_in_a_batch() -> None:
    several = scenes(4, 12)
    together = draw(several, 64)
    assert torch.equal(together, draw(several, 64))
    for scene, picture in zip(several, together, strict=True):
        torch.testing.assert_close(draw([scene], 64)[0], picture, rtol=0, atol=1e-6)


def test_a_picture_shows_its_colours_exactly_where_they_are() -> None:
    scene = Scene("single", (Thing("circle", "red", 0.5, 0.5, 0.3),), "blue")
    (picture,) = to_bytes(draw([scene], 64))
    assert tuple(picture[32, 32]) == PALETTE["red"]
    assert tuple(picture[2, 2]) == PALETTE["blue"]


@pytest.mark.parametrize("shape", MORE_SHAPES)
def test_the_covered_area_does_not_depend_on_the_resolution(shape: str) -> None:
    """Antialiasing: a shape's edge pixels count in part, so its area is nearly the same at any number of pixels."""
    scene = Scene("single", (Thing(shape, "white", 0.5, 0.5, 0.35),), "black")
    small, large = (draw([scene], size).mean().item() for size in (64, 256))
    assert small == pytest.approx(large, abs=0.004)


def test_jitter_is_below_a_pixel() -> None:
    rng = random.Random(3)
    for scene in scenes(3, 100):
        for before, after in zip(scene.things, jittered(scene, rng).things, strict=True):
            assert abs(before.x - after.x) < 1 / 128
            assert abs(before.y - after.y) < 1 / 128
            assert after.radius == pytest.approx(before.radius, rel=0.02)


def test_the_domain_is_told_in_words_that_grow_with_the_stage() -> None:
    told = [domain(stage) for stage in STAGES]
    assert sorted(told, key=len) == told
    assert all(name in told[-1] for name in (*MORE_SHAPES, *MORE_COLOURS))
