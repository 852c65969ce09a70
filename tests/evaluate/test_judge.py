"""The judge keeps the laws of a dual encoder, and the package's one tells right captions from wrong ones."""

import random
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.errors import CorruptFileError, RequestError, WrongModelError
from octavo.evaluate.judge import FEATURES, LONGEST, SIDE, Judge, load_judge, save_judge
from octavo.train.captions import caption
from octavo.train.drawing import draw
from octavo.train.judge import STAGE, to_uint8
from octavo.train.neighbours import changeable, changed, same_picture
from octavo.train.scenes import Scene, jittered, sample_scene


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(f"test {seed}")
    found: dict[object, Scene] = {}
    while len(found) < count:
        scene = sample_scene(rng, STAGE)
        found.setdefault(same_picture(scene), scene)
    return list(found.values())


def pictures(of: list[Scene], size: int = 64) -> Tensor:
    rng = random.Random("jitter")
    return to_uint8(draw([jittered(scene, rng) for scene in of], size))


# ── the package's judge ───────────────────────────────────────────────────────────────────────────────────────────
def test_a_caption_is_found_among_a_hundred(judge: Judge) -> None:
    """Chance is 1 %; 1 000 of 1 000 in the docs."""
    shown, rng = scenes(100), random.Random(1)
    cosines = judge.image_features(pictures(shown)) @ judge.text_features([caption(s, rng) for s in shown]).T
    right = torch.arange(100)
    assert (cosines.argmax(dim=1) == right).float().mean() > 0.97
    assert (cosines.argmax(dim=0) == right).float().mean() > 0.97


def test_the_right_caption_is_preferred_to_one_of_any_wrong_attribute(judge: Judge) -> None:
    """Chance is 50 %; 99.8 % and more in the docs."""
    shown, rng = scenes(60, seed=2), random.Random(2)
    drawn = pictures(shown)
    own = judge.similarity(drawn, [caption(scene, rng) for scene in shown])
    better: dict[str, list[bool]] = {}
    for i, scene in enumerate(shown):
        for attribute in changeable(scene):
            wrong = judge.similarity(drawn[i : i + 1], [caption(changed(scene, attribute, rng), rng)])
            better.setdefault(attribute, []).append(bool(own[i] > wrong))
    for attribute, verdicts in better.items():
        assert sum(verdicts) > 0.95 * len(verdicts), attribute


def test_the_package_file_is_small() -> None:
    assert len((files("octavo.embedded") / "judge.safetensors").read_bytes()) <= 300_000


# ── laws of the numbers ───────────────────────────────────────────────────────────────────────────────────────────
def test_features_have_unit_length_and_do_not_depend_on_the_batch(judge: Judge) -> None:
    drawn = pictures(scenes(40))
    captions = [caption(scene, random.Random(0)) for scene in scenes(40)]
    for together, alone in (
        (judge.image_features(drawn), judge.image_features(drawn[33:34])),
        (judge.text_features(captions), judge.text_features(captions[33:34])),
    ):
        assert together.shape == (40, FEATURES)
        assert together.dtype == torch.float32
        torch.testing.assert_close(together.norm(dim=1), torch.ones(40))
        torch.testing.assert_close(together[33:34], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [SIDE, 256])
def test_a_picture_s_size_hardly_matters(size: int, judge: Judge) -> None:
    shown = scenes(20)
    cosines = (judge.image_features(pictures(shown, size)) * judge.image_features(pictures(shown, 128))).sum(dim=1)
    assert cosines.min() > 0.98


def test_similarity_is_a_hundred_times_the_cosine_and_never_negative(judge: Judge) -> None:
    shown, rng = scenes(30), random.Random(3)
    drawn, captions = pictures(shown), [caption(scene, rng) for scene in reversed(shown)]
    cosines = (judge.image_features(drawn) * judge.text_features(captions)).sum(dim=1)
    assert (cosines < 0).any()
    torch.testing.assert_close(judge.similarity(drawn, captions), 100 * cosines.clamp(min=0))


@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        ("a red star", "A photorealistic RED, star!"),
        ("a red star", "a (red:1.2) star"),
        ("", "quarterly earnings"),
        ("red " * LONGEST, "red " * LONGEST + "blue star"),
    ],
)
def test_what_the_judge_does_not_know_changes_nothing(prompt: str, same: str, judge: Judge) -> None:
    assert torch.equal(judge.text_features([prompt]), judge.text_features([same]))


def test_the_order_of_words_matters(judge: Judge) -> None:
    ahead, behind = judge.text_features(["a red star left of a blue ring", "a blue ring left of a red star"])
    assert ahead @ behind < 0.9


def test_perceptual_distance_is_that_of_unit_vectors_by_place_and_layer(judge: Judge) -> None:
    """Of unit vectors |x - y|² = 2 - 2 cos, place by place."""
    a, b = pictures(scenes(3)), pictures(scenes(3, seed=1))
    layers = zip(judge.layer_features(a), judge.layer_features(b), strict=True)
    by_layer = []
    for x, y in layers:
        cosine = torch.cosine_similarity(x.double(), y.double(), dim=1)
        present = (x.norm(dim=1) > 0).double() + (y.norm(dim=1) > 0).double()  # a dead place is a zero vector
        by_layer.append((present - 2 * cosine).mean(dim=(1, 2)))
    expected = torch.stack(by_layer).mean(dim=0).float()
    torch.testing.assert_close(judge.perceptual_distance(a, b), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(judge.perceptual_distance(b, a), expected, atol=1e-5, rtol=0)


def test_perceptual_distance_is_zero_for_itself_and_grows_with_noise(judge: Judge) -> None:
    a = pictures(scenes(8))
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        judge.perceptual_distance(a, (a + strength * noise).round().clamp(0, 255).byte()).mean()
        for strength in (0, 4, 16, 64)
    ]
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert distances[-1] < 2


# ── files and wrong use ───────────────────────────────────────────────────────────────────────────────────────────
def test_a_saved_judge_comes_back_with_its_words(tmp_path: Path) -> None:
    judge = Judge(["red", "star"])
    save_judge(judge, tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors")
    assert again.vocabulary == ("red", "star")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, judge.state_dict()[name].half().float()), name


def test_wrong_pictures_and_numbers_of_prompts_are_told(judge: Judge) -> None:
    drawn = pictures(scenes(2))
    with pytest.raises(RequestError, match=r"torch\.float32 \[2, 3, 64, 64\].*uint8"):
        judge.image_features(drawn.float())
    with pytest.raises(RequestError, match=r"\[2, 64, 64, 3\].*\[B, 3, H, W\]"):
        judge.image_features(drawn.movedim(1, -1))
    with pytest.raises(RequestError, match="2 pictures and 1 prompts"):
        judge.similarity(drawn, ["a red star"])
    with pytest.raises(RequestError, match="2 pictures cannot be compared one by one with 1"):
        judge.perceptual_distance(drawn, drawn[:1])


def test_wrong_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    with pytest.raises(CorruptFileError, match="octavo train judge"):
        load_judge(path)
    path.write_bytes(b"not a judge")
    with pytest.raises(CorruptFileError, match="cannot be read as a judge"):
        load_judge(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(WrongModelError, match="is no judge: its header has no"):
        load_judge(path)
    save_file({"weight": torch.zeros(1)}, path, metadata={"octavo.vocabulary": '["red"]'})
    with pytest.raises(WrongModelError, match="no judge of this version"):
        load_judge(path)
