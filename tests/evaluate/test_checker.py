"""The checker reads drawings without mistakes, and its verdicts name what is wrong."""

import random
from dataclasses import replace

import numpy as np
import pytest

from octavo.evaluate.checker import ATTRIBUTES, ShapeClassifier, judge, load_classifier, read
from octavo.evaluate.examine import examine
from octavo.evaluate.lettering import UNREADABLE
from octavo.evaluate.prompts import Question, questions
from octavo.train.drawing import draw, to_bytes
from octavo.train.scenes import MIXES, Scene, Thing, is_held_out, jittered, sample_scene
from octavo.train.spelling import Word, fitting_radius


@pytest.fixture(scope="module")
def classifier() -> ShapeClassifier:
    return load_classifier()


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("stage", list(MIXES))
def test_the_truth_is_read_back(stage: int, size: int, classifier: ShapeClassifier) -> None:
    asked = questions(stage, 100)
    scenes = {question.prompt: question.scene for question in asked}
    outcome = examine(lambda prompts: list(to_bytes(draw([scenes[p] for p in prompts], size))), asked, classifier)
    assert outcome.rates()["all"] >= 0.99


def test_questions_are_held_out_different_and_the_same_every_time() -> None:
    asked = questions(3, 60)
    assert asked == questions(3, 60)
    assert len({question.prompt for question in asked}) == 60
    assert all(any(is_held_out(t.shape, t.colour) for t in question.scene.things) for question in asked)
    assert sum(question.unseen_wording for question in asked) == 30


BASE = Scene(
    "pair",
    (Thing("star", "red", 0.26, 0.5, 0.2), Thing("circle", "blue", 0.74, 0.5, 0.2)),
    "white",
    relation="left of",
)
STAR, CIRCLE = BASE.things


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (BASE, set()),
        (replace(BASE, background="pink"), {"background"}),
        (replace(BASE, things=(replace(STAR, colour="green"), CIRCLE)), {"colour"}),
        (replace(BASE, things=(replace(STAR, shape="heart"), CIRCLE)), {"shape"}),
        (replace(BASE, things=(replace(STAR, colour="blue"), replace(CIRCLE, colour="red"))), {"colour"}),
        (replace(BASE, things=(STAR,)), {"count", "colour", "shape", "place", "size"}),
        (replace(BASE, things=(replace(STAR, x=0.74), replace(CIRCLE, x=0.26))), {"place"}),
        (replace(BASE, things=(replace(STAR, y=0.25), CIRCLE)), {"place"}),
        (replace(BASE, things=(replace(STAR, radius=0.12), CIRCLE)), {"size"}),
    ],
)
def test_a_verdict_names_exactly_what_is_wrong(shown: Scene, wrong: set[str], classifier: ShapeClassifier) -> None:
    (picture,) = to_bytes(draw([shown], 128))
    verdict = judge(BASE, read(picture, classifier))
    assert {name for name in ATTRIBUTES if not verdict[name]} == wrong
    assert verdict["all"] == (not wrong)


SIGN = Scene(
    "word and thing",
    (Thing("star", "red", 0.5, 0.33, 0.25),),
    "white",
    relation="above",
    word=Word("OCEAN", "blue", 0.5, 0.8, fitting_radius("OCEAN")),
)
OCEAN = SIGN.word
assert OCEAN is not None


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (SIGN, set()),
        (replace(SIGN, word=replace(OCEAN, text="OCEAM")), {"word"}),
        (replace(SIGN, word=replace(OCEAN, text="OCEN", x=0.5)), {"word"}),
        (replace(SIGN, word=replace(OCEAN, colour="green")), {"colour"}),
        (replace(SIGN, word=replace(OCEAN, text="CAN", radius=0.17)), {"word", "size"}),
        (replace(SIGN, word=None), {"word", "colour", "place", "size"}),
        (replace(SIGN, things=()), {"count", "colour", "shape", "place", "size"}),
        (
            replace(SIGN, things=(replace(SIGN.things[0], y=0.67),), word=replace(OCEAN, y=0.2)),
            {"place"},
        ),
    ],
)
def test_a_verdict_on_a_word_names_exactly_what_is_wrong(
    shown: Scene, wrong: set[str], classifier: ShapeClassifier
) -> None:
    (picture,) = to_bytes(draw([shown], 128))
    verdict = judge(SIGN, read(picture, classifier))
    assert {name for name in ATTRIBUTES if not verdict[name]} == wrong


def test_any_forty_words_are_read_letter_by_letter(classifier: ShapeClassifier) -> None:
    rng = random.Random(6)
    shown = [
        jittered(sample_scene(rng, 5, kind=kind, held_out=held_out), rng)
        for kind in ("word", "word and thing")
        for held_out in (False, True)
        for _ in range(10)
    ]
    for scene, picture in zip(shown, to_bytes(draw(shown, 128)), strict=True):
        verdict = judge(scene, read(picture, classifier))
        assert verdict["all"], (scene.word, verdict)


def test_what_is_no_letter_is_not_read_as_one(classifier: ShapeClassifier) -> None:
    """Three discs in a row stand as letters do, but are none."""
    things = tuple(Thing("circle", "red", x, 0.5, 0.1) for x in (0.2, 0.5, 0.8))
    (picture,) = to_bytes(draw([Scene("several", things, "white")], 128))
    word = read(picture, classifier).word
    assert word is not None
    assert set(word.text) == {UNREADABLE}


def test_words_are_counted_only_where_one_was_asked_for(classifier: ShapeClassifier) -> None:
    asked = [Question("a star", SIGN, False), Question("a pair", BASE, False)]
    (star_alone,) = to_bytes(draw([replace(SIGN, word=None)], 64))
    rates = examine(lambda prompts: [star_alone] * len(prompts), asked, classifier).rates()
    assert rates["word"] == 0
    assert "word" not in examine(lambda prompts: [star_alone] * len(prompts), asked[1:], classifier).rates()


def test_an_empty_picture_is_read_as_a_background_alone(classifier: ShapeClassifier) -> None:
    reading = read(np.full((64, 64, 3), (36, 160, 72), dtype=np.uint8), classifier)
    assert reading.background == "green"
    assert reading.things == ()
    assert reading.word is None


def test_noise_is_no_crowd_of_things_that_passes(classifier: ShapeClassifier) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not judge(BASE, read(noise, classifier))["all"]
