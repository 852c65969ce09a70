"""The judge's lessons: neighbours differ in what they say, the loss is CLIP's, and the command gives a file."""

import math
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from octavo.cli.train import train
from octavo.evaluate import checker
from octavo.evaluate.judge import load_judge
from octavo.train import judge as job
from octavo.train.captions import words
from octavo.train.drawing import draw, to_bytes
from octavo.train.neighbours import ATTRIBUTES, changeable, changed, same_picture
from octavo.train.scenes import Scene, sample_scene

TINY = job.JudgeRecipe(size=32, batch=16, pool=8)


def sampled(attribute: str, count: int) -> list[tuple[Scene, Scene]]:
    """Scenes, each with its neighbour in `attribute`."""
    rng = random.Random(f"test {attribute}")
    pairs = []
    while len(pairs) < count:
        scene = sample_scene(rng, job.STAGE, held_out=rng.random() < 0.5)
        if attribute in changeable(scene):
            pairs.append((scene, changed(scene, attribute, rng)))
    return pairs


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_neighbour_differs_in_one_attribute_as_the_checker_sees_it(attribute: str) -> None:
    classifier = checker.load_classifier()
    pairs = sampled(attribute, 40)
    # For the checker the relation of two things is a matter of their places.
    seen_as = {"relation": "place", "binding": "colour"}.get(attribute, attribute)
    for (scene, other), picture in zip(pairs, to_bytes(draw([other for _, other in pairs], 128)), strict=True):
        reading = checker.read(picture, classifier)
        assert checker.judge(other, reading)["all"]
        verdict = checker.judge(scene, reading)
        wrong = {name for name in checker.ATTRIBUTES if not verdict[name]}
        # A large thing is larger in the center than elsewhere, and a small one nearer to its corner than a large one.
        assert wrong == {seen_as} or (seen_as in wrong == {"place", "size"})


def test_scenes_of_one_picture_are_known_as_such() -> None:
    rng = random.Random(4)
    shown = [sample_scene(rng, job.STAGE) for _ in range(300)]
    drawn = draw(shown, 16).flatten(1)
    for i in range(1, len(shown)):
        same = (drawn[:i] == drawn[i]).all(dim=1).tolist()
        assert same == [same_picture(scene) == same_picture(shown[i]) for scene in shown[:i]]


def test_the_loss_of_features_that_match_exactly_is_that_of_the_temperature() -> None:
    """With orthogonal pairs: -log(e^s / (e^s + B - 1)), both ways."""
    pairs = sampled("colour", 4)
    shown = list({same_picture(scene): scene for pair in pairs for scene in pair}.values())
    features = torch.eye(len(shown), 16)
    expected = math.log(1 + (len(shown) - 1) * math.exp(-3.0))
    assert job.contrastive_loss(features, features, shown, 3.0).item() == pytest.approx(expected, rel=1e-5)


def test_captions_of_the_same_picture_do_not_count_as_wrong() -> None:
    (scene, other), *_ = sampled("shape", 1)
    features = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    with_twin = job.contrastive_loss(features, features, [scene, scene, other], 5.0)
    cosines = (5 * features @ features.T).double()

    def entropy(row: int, rows: list[int]) -> float:
        return float(torch.logsumexp(cosines[row, rows], 0) - cosines[row, row])

    expected = (entropy(0, [0, 2]) + entropy(1, [1, 2]) + entropy(2, [0, 1, 2])) / 3
    assert with_twin.item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_holds_families_and_is_the_same_for_the_same_chance(tmp_path: Path) -> None:
    pool = job.load_reconstructions(tmp_path, lambda x: x, recipe=TINY, seed=0, report=lambda _: None)
    batch, again = (job.draw_batch(pool, random.Random("step 7"), TINY) for _ in range(2))
    assert batch.scenes == again.scenes
    assert torch.equal(batch.pictures, again.pictures)
    assert batch.pictures.shape == (TINY.batch, 3, TINY.side, TINY.side)
    assert batch.pictures.dtype == torch.uint8
    for start in range(0, TINY.batch, TINY.family):
        first, *others = (same_picture(scene) for scene in batch.scenes[start : start + TINY.family])
        assert len({first, *others}) == TINY.family
    clean = job.to_uint8(draw(batch.scenes, TINY.side)).float()
    assert (batch.pictures.float() - clean).abs().mean() < 12  # noise and jitter, and the pool's smaller pictures


def test_pictures_go_through_the_vae_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def reconstruct(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        return -pixels

    first, second = (
        job.load_reconstructions(tmp_path, reconstruct, recipe=TINY, seed=0, report=lambda _: None) for _ in range(2)
    )
    assert sum(calls) == TINY.pool
    assert first.scenes == second.scenes
    assert torch.equal(first.pictures, second.pictures)


def test_captions_of_either_order_are_taught() -> None:
    (_, scene), *_ = sampled("place", 1)
    rng = random.Random(0)
    assert all("there is" in text or "the background is" in text for text in (job.say(scene, rng, 1) for _ in range(9)))
    assert {word for _ in range(99) for word in job.say(scene, rng, 0).split()} - set(words(3)) <= {"unfamiliar"}


@pytest.mark.gradients
def test_the_command_gives_a_judge_and_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "JudgeRecipe", partial(job.JudgeRecipe, size=32, batch=16, pool=8))
    for minutes in ("0.01", "0.02"):
        result = CliRunner().invoke(train, ["judge", "--minutes", minutes, "--out", str(tmp_path)])
        assert result.exit_code == 0, result.output
    assert "judge.safetensors" in result.output
    judge = load_judge(tmp_path / "judge.safetensors")
    assert judge.vocabulary == tuple(words(3))
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert all(bool(tensor.isfinite().all()) for tensor in judge.state_dict().values())
