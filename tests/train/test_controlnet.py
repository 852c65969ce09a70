"""The embedded ControlNet: its lessons, how it begins, that it learns, and the file that it becomes."""

import random
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch

import octavo
from octavo.checkpoint.load import load_controlnet
from octavo.fp8 import Fp8Linear
from octavo.pipeline.components import Components
from octavo.train.captions import words
from octavo.train.controlnet import (
    ControlRecipe,
    Steered,
    control_loss,
    edges_of,
    export_controlnet,
    lesson_caption,
    lesson_scene,
    make_lessons,
    train_controlnet,
    unshaped,
)
from octavo.train.drawing import draw
from octavo.train.loop import Budget
from octavo.train.scenes import MORE_COLOURS

pytestmark = pytest.mark.gradients

SMALL = ControlRecipe(pictures=4, size=64, batch=2)


@cache
def components() -> Components:
    return octavo.load(device="cpu", dtype="float32")


def test_every_lesson_has_edges_and_most_say_nothing_of_shapes() -> None:
    rng = random.Random(0)
    scenes = [lesson_scene(rng) for _ in range(64)]
    assert all(edges.sum() > 60 for edges in edges_of(draw(scenes, 128))[:, 0])
    assert {len(scene.things) for scene in scenes} == {1, 2}
    neutral = {*MORE_COLOURS, "and", "on", "a", "background"}
    assert all(set(unshaped(scene).split()) <= neutral <= {*words(), "gray"} for scene in scenes)
    told = [lesson_caption(scene, rng) for scene in scenes]
    assert sum(set(text.split()) <= neutral for text in told) > len(told) / 2


def test_before_training_it_changes_nothing_and_training_makes_it_matter(tmp_path: Path) -> None:
    lessons = make_lessons(components(), tmp_path, SMALL, report=lambda _: None)
    mmdit = deepcopy(components().mmdit()).bfloat16()
    steered = Steered(components().mmdit(), SMALL).bfloat16()
    told = (lessons.latents, torch.full((4,), 0.7), lessons.context, lessons.pooled)
    with torch.no_grad():
        plain = mmdit(told[0], told[2], mmdit.modulation(1000 * told[1], told[3]))
        assert torch.equal(steered(*told, lessons.hints[0]), plain)
    control_loss(steered, lessons, random.Random(1), SMALL).backward()
    gradient = steered.net.outputs[0].weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    assert all(p.grad is None for p in components().mmdit().parameters()), "the model is frozen"


def test_it_learns_and_is_kept_in_fp8(tmp_path: Path) -> None:
    model = components()
    lines: list[str] = []
    net, progress = train_controlnet(model, tmp_path, budget=Budget(steps=3), recipe=SMALL, report=lines.append)
    assert progress.steps == 3
    assert net.outputs[0].weight.abs().max() > 0
    path = export_controlnet(net, tmp_path / "net.safetensors")
    loaded = load_controlnet(path)
    assert loaded.config == net.config
    assert (loaded.config.control_type, loaded.config.mlp_ratio) == ("canny", 2)
    assert isinstance(loaded.outputs[0], Fp8Linear)
    mmdit = model.mmdit()
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled, told = torch.zeros(1, 128), torch.zeros(1, 4, 128)
        exact, rounded = (
            each(latents, latents, told, each.modulation(torch.tensor([500.0]), pooled), embed=mmdit.embed_image)[0]
            for each in (net, loaded)
        )
    # Weights rounded to 3 bits of mantissa err by at most a 16th each, at random.
    assert 0 < (exact - rounded).norm() / exact.norm() < 1 / 8
