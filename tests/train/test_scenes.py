"""The world, its words and its pictures: the caption decides the picture."""

import random
import string
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer

from octavo.checkpoint.folders import EMBEDDED
from octavo.text.words import word_level_tokenizer
from octavo.train.captions import LONGEST, caption, length, words
from octavo.train.drawing import draw, to_bytes
from octavo.train.glyphs import HALF_WIDTH
from octavo.train.model import tokenizers
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
from octavo.train.spelling import (
    KEPT_OUT_WORDS,
    LINE_WIDTH,
    LONGEST_WORD,
    SHORTEST_WORD,
    TRAINING_WORDS,
    WORDS,
    Word,
    fitting_radius,
    sample_word,
)

STAGES = tuple(MIXES)


def _marks(scene: Scene) -> Sequence[Thing | Word]:
    return [*scene.things, *([scene.word] if scene.word else [])]


def scenes(stage: int, count: int, *, held_out: bool = False) -> list[Scene]:
    rng = random.Random(f"test {stage}")
    return [sample_scene(rng, stage, held_out=held_out) for _ in range(count)]


@pytest.mark.parametrize("stage", STAGES)
def test_training_never_shows_a_kept_out_pair_and_examinations_always_do(stage: int) -> None:
    for scene in scenes(stage, 500):
        assert not any(is_held_out(t.shape, t.colour) for t in scene.things)
        assert scene.word is None or scene.word.text not in KEPT_OUT_WORDS
    for scene in scenes(stage, 500, held_out=True):
        assert any(is_held_out(t.shape, t.colour) for t in scene.things) or not scene.things
        assert (scene.word.text in KEPT_OUT_WORDS) if scene.word else scene.things


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
        if scene.word:
            assert scene.word.colour != scene.background
            letters = [x for _, x in scene.word.spots()]
            half_width = HALF_WIDTH * scene.word.radius
            assert 0 < letters[0] - half_width < letters[-1] + half_width < 1
            assert all(abs(t.y - scene.word.y) > t.radius + scene.word.radius for t in scene.things)


@pytest.mark.parametrize("stage", STAGES)
def test_a_caption_decides_the_picture(stage: int) -> None:
    """Two scenes that can be worded alike are alike: nothing that a caption leaves out varies."""
    rng = random.Random(0)
    shown: dict[str, Scene] = {}
    for scene in scenes(stage, 4000):
        text = caption(scene, rng)
        plain = Scene("", scene.things, scene.background, scene.background_end, word=scene.word)
        assert shown.setdefault(text, plain) == plain, text


def test_what_is_said_about_a_word_decides_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, with one and the same word everywhere, so that thousands of captions are said more than once."""
    monkeypatch.setattr("octavo.train.scenes.sample_word", lambda *_, **__: "SUN")
    rng = random.Random(7)
    shown: dict[str, Scene] = {}
    repeated = 0
    for _ in range(12_000):
        scene = sample_scene(rng, 5, kind=rng.choice(["word", "word and thing"]))
        text = caption(scene, rng)
        plain = Scene("", scene.things, scene.background, word=scene.word)
        repeated += text in shown
        assert shown.setdefault(text, plain) == plain, text
    assert repeated > 500


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_captions_are_short_and_made_of_known_words(stage: int, unseen: bool) -> None:
    tokenizer = word_level_tokenizer(words(), letters=True)
    rng = random.Random(1)
    for scene in [s for s in scenes(stage, 400) if s.says_background]:
        text = caption(scene, rng, unseen=unseen)
        assert 0 < length(text) <= LONGEST
        assert len(tokenizer.encode(text).ids) == length(text) + 2
        unknown = [t for t in tokenizer.encode(text).tokens if t == "<unknown>"]
        assert not unknown or "unfamiliar" in text


def test_unseen_wordings_are_never_used_in_training() -> None:
    rng = random.Random(2)
    known = {caption(scene, rng) for scene in scenes(3, 3000)}
    unseen = {caption(scene, rng, unseen=True) for scene in scenes(3, 3000) if scene.says_background}
    assert not known & unseen


def test_the_vocabulary_is_that_of_the_model_in_the_package() -> None:
    """Its embeddings were trained for these ids: a word more, or another order, and it cannot be trained further."""
    for name, tokenizer in zip(("clip_l", "t5xxl"), tokenizers(), strict=True):
        path = EMBEDDED / "text_encoders" / f"{name}.tokenizer.json"
        assert tokenizer.get_vocab() == Tokenizer.from_file(str(path)).get_vocab()


def test_kept_out_words_are_never_spelt_in_training() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert set(KEPT_OUT_WORDS) | set(TRAINING_WORDS) == set(WORDS)
    assert not set(KEPT_OUT_WORDS) & set(TRAINING_WORDS)
    assert all(SHORTEST_WORD <= len(word) <= LONGEST_WORD and word.isupper() for word in WORDS)
    rng = random.Random(4)
    spelt = {sample_word(rng) for _ in range(20_000)}
    assert not spelt & set(KEPT_OUT_WORDS)
    assert set(TRAINING_WORDS) <= spelt
    assert {sample_word(rng, held_out=True) for _ in range(2_000)} == set(KEPT_OUT_WORDS)


def test_training_shows_every_letter_of_kept_out_words_where_they_have_it() -> None:
    shown = {(len(word), i, letter) for word in TRAINING_WORDS for i, letter in enumerate(word)}
    rng = random.Random(5)
    shown |= {(len(w), i, letter) for w in (sample_word(rng) for _ in range(2_000)) for i, letter in enumerate(w)}
    assert {(len(word), i, letter) for word in KEPT_OUT_WORDS for i, letter in enumerate(word)} <= shown


@pytest.mark.parametrize("length_of_word", range(SHORTEST_WORD, LONGEST_WORD + 1))
def test_a_word_fills_its_line_and_its_letters_do_not_touch(length_of_word: int) -> None:
    text = "N" * length_of_word  # a letter of full width and height
    word = Word(text, "black", 0.5, 0.5, fitting_radius(text))
    (picture,) = draw([Scene("word", (), "white", word=word)], 256)
    inked = (picture[0] < 0).any(dim=0).nonzero().flatten().tolist()
    begins = [column for column in inked if column - 1 not in inked]
    assert len(begins) == length_of_word
    assert 0.9 * LINE_WIDTH < (inked[-1] - inked[0]) / 256 < LINE_WIDTH
    assert inked[0] == pytest.approx(255 - inked[-1], abs=1)


def test_no_two_letters_look_alike() -> None:
    pictures = draw([Scene("", (), "white", word=Word(a, "black", 0.5, 0.5, 0.3)) for a in string.ascii_uppercase], 64)
    flat = pictures.mean(dim=1).flatten(1)
    apart = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    assert apart[~torch.eye(26, dtype=torch.bool)].min() > 0.15


def test_drawing_is_deterministic_and_alike_alone_and_in_a_batch() -> None:
    several = scenes(5, 24)
    assert any(scene.word for scene in several)
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
    for scene in scenes(5, 100):
        moved = jittered(scene, rng)
        for before, after in zip(_marks(scene), _marks(moved), strict=True):
            assert abs(before.x - after.x) < 1 / 128
            assert abs(before.y - after.y) < 1 / 128
            assert after.radius == pytest.approx(before.radius, rel=0.02)


def test_the_domain_is_told_in_words_that_grow_with_the_stage() -> None:
    told = [domain(stage) for stage in STAGES]
    assert sorted(told, key=len) == told
    assert all(name in told[-1] for name in (*MORE_SHAPES, *MORE_COLOURS))
