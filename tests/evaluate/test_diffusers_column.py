"""A diffusers pipeline as a column: asked with the prompt's seed and the user's settings, once for each picture."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from octavo.errors import MissingExtraError, ModelNotFoundError
from octavo.evaluate.columns import DiffusersColumn
from octavo.evaluate.comparison import Options, compare
from octavo.evaluate.features import read_pixels
from octavo.evaluate.prompt_set import Prompt

pytest.importorskip("torchmetrics", reason="the eval extra is not installed")

PROMPTS = [Prompt("a red star"), Prompt("a blue moon")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a stand-in for diffusers was asked; it draws one random level a picture, by the generator it is given."""
    calls: list[dict[str, Any]] = []

    class Pipeline:
        @classmethod
        def from_pretrained(cls, path: str, **options: Any) -> "Pipeline":
            if path == "nowhere":
                raise OSError("nowhere is no folder")
            calls.append({"path": path, **options})
            return cls()

        def set_progress_bar_config(self, *, disable: bool) -> None:
            assert disable

        def to(self, device: torch.device) -> "Pipeline":
            assert device.type == "cpu"
            return self

        def __call__(self, prompt: str, *, generator: torch.Generator, **options: Any) -> SimpleNamespace:
            calls.append({"prompt": prompt, "seed": generator.initial_seed(), **options})
            level = int(torch.randint(256, (), generator=generator))
            return SimpleNamespace(images=[Image.new("RGB", (32, 32), (level, 0, 0))])

    module = ModuleType("diffusers")
    module.__dict__["DiffusionPipeline"] = Pipeline
    monkeypatch.setitem(sys.modules, "diffusers", module)
    return calls


def column(path: str = "some/model") -> DiffusersColumn:
    return DiffusersColumn(name="theirs", path=path, device="cpu")


def test_prompts_seeds_and_settings_reach_the_pipeline_and_nothing_else_does(
    asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    options = Options(settings={"steps": 3, "guidance_scale": 0.0}, seed=7)
    comparison = compare([column()], PROMPTS, out=tmp_path, options=options)
    assert asked == [
        {"path": "some/model", "dtype": torch.float32},
        {"prompt": "a red star", "seed": 7, "num_inference_steps": 3, "guidance_scale": 0.0},
        {"prompt": "a blue moon", "seed": 8, "num_inference_steps": 3, "guidance_scale": 0.0},
    ]
    level = int(torch.randint(256, (), generator=torch.Generator().manual_seed(8)))
    assert int(read_pixels(tmp_path / "pictures" / "theirs" / "00002.png")[0, 0, 0]) == level
    assert comparison.columns[0].performance["seconds"] > 0
    assert "evaluations_per_second" not in comparison.columns[0].performance


def test_pictures_that_are_there_are_not_drawn_again(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    compare([column()], PROMPTS[:1], out=tmp_path)
    compare([column()], PROMPTS, out=tmp_path)
    assert [call["prompt"] for call in asked if "prompt" in call] == ["a red star", "a blue moon"]
    before = len(asked)
    compare([column()], PROMPTS, out=tmp_path)
    assert len(asked) == before


def test_a_pipeline_that_is_not_there_is_named(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere is no folder"):
        compare([column("nowhere")], PROMPTS)
    assert not asked


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"octavo\[bench\]"):
        column().pipeline()
