"""The checker reads drawings without mistakes, and its verdicts name what is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from octavo.evaluate.checker import ATTRIBUTES, ShapeClassifier, judge, load_classifier, read
from octavo.evaluate.examine import examine
from octavo.evaluate.prompts import questions
from octavo.train.drawing import draw, to_bytes
from octavo.train.scenes import MIXES, Scene, Thing, is_held_out


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


def test_an_empty_picture_is_read_as_a_background_alone(classifier: ShapeClassifier) -> None:
    reading = read(np.full((64, 64, 3), (36, 160, 72), dtype=np.uint8), classifier)
    assert reading.background == "green"
    assert reading.things == ()


def test_noise_is_no_crowd_of_things_that_passes(classifier: ShapeClassifier) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not judge(BASE, read(noise, classifier))["all"]
