"""`octavo lora` and `octavo train lora` as a user meets them: results on stdout, the rest on stderr."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from octavo.checkpoint.load import load_mmdit
from octavo.checkpoint.tensors import open_tensors
from octavo.cli import main as cli
from octavo.fp8 import Fp8Linear
from octavo.models import MMDiT
from octavo.models.adapter import weight_of
from octavo.pipeline.image import read_settings
from tests.lora_files import low_rank, write_lora
from tests.tiny_tree import MODEL, write_tiny_tree

LAYERS = ("joint_blocks.0.x_block.attn.qkv", "joint_blocks.1.x_block.mlp.fc1")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """In a folder with models/, the tiny model and a LoRA of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("OCTAVO_MODELS", raising=False)
    write_tiny_tree(tmp_path / "models")
    with torch.device("meta"):
        model = MMDiT(MODEL)
    write_lora(tmp_path / "models" / "loras" / "style.safetensors", mmdit=low_rank(model, LAYERS, size=0.5))

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["octavo", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return (exit_.value.code if isinstance(exit_.value.code, int) else 0), out.strip(), err

    return run


def test_info_tells_layers_ranks_and_kind(run: Run) -> None:
    code, out, _ = run("lora", "info", "style", "--layers")
    assert code == 0
    assert "changes 2 layers of the diffusion model" in out
    assert "by 2 × LoRA; ranks 4 (2 layers)" in out
    assert all(f"diffusion_model.{name}: LoRA, rank 4" in out for name in LAYERS)
    told = json.loads(run("lora", "info", "style", "--json")[1])
    assert told["ranks"] == {"4": 2}
    code, _, err = run("lora", "info", "models/checkpoints/tiny.safetensors")
    assert code == 2
    assert "none of its" in err


def test_merge_writes_16_bits_or_what_a_recipe_says(run: Run) -> None:
    assert run("lora", "merge", "tiny", "style:0.5", "merged.safetensors")[:2] == (0, "merged.safetensors")
    code, out, _ = run("lora", "merge", "tiny", "style:0.5", "merged-fp8.safetensors", "--recipe", "row", "--quiet")
    assert (code, out) == (0, "merged-fp8.safetensors")
    before, after = (load_mmdit(path) for path in ("models/checkpoints/tiny.safetensors", "merged.safetensors"))
    fp8 = load_mmdit("merged-fp8.safetensors")
    for name in LAYERS:
        assert not torch.equal(weight_of(before.get_submodule(name)), weight_of(after.get_submodule(name)))
        assert isinstance(fp8.get_submodule(name), Fp8Linear)
        exact = weight_of(after.get_submodule(name))
        # e4m3fn keeps three bits beside the first: half a step is a sixteenth, or a part of the row's scale.
        bound = exact.abs() / 16 + exact.abs().amax(dim=1, keepdim=True) / 448
        assert bool(((weight_of(fp8.get_submodule(name)) - exact).abs() <= bound).all())
    for words, message in (
        (("merged.safetensors",), "Name the LoRAs and the file"),
        (("style:0.5", "merged.safetensors"), "there already"),
        (("style:much", "x.safetensors"), "'much' is not a strength"),
        (("nothing", "x.safetensors"), "There is no LoRA 'nothing'"),
    ):
        code, _, err = run("lora", "merge", "tiny", *words)
        assert code == 2
        assert message in err


def test_what_is_trained_is_drawn_with(run: Run) -> None:
    Path("data").mkdir()
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (32, 32), colour).save(f"data/{i}.png")
        Path(f"data/{i}.txt").write_text(f"a {colour} star")
    words = ("--model", "tiny", "--steps", "2", "--batch", "2", "--rank", "2", "--size", "32", "--format", "kohya")
    code, out, err = run("train", "lora", "--data", "data", "--out", "mine.safetensors", *words)
    assert (code, out) == (0, "mine.safetensors"), err
    with open_tensors(Path("mine.safetensors")) as file:
        assert "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight" in file.entries
        assert json.loads(file.metadata["octavo.lora"])["steps"] == 2
    size = ("--model", "tiny", "--size", "32", "--steps", "1", "--seed", "1")
    code, out, err = run("generate", "a red star <lora:style:0.5>", "--lora", "mine.safetensors:0.7", *size)
    assert code == 0, err
    settings = read_settings(out)
    assert settings["prompt"] == "a red star"
    assert settings["loras"] == [
        {"name": "mine.safetensors", "strength": 0.7}, {"name": "style", "strength": 0.5}
    ]  # fmt: skip
    code, again, _ = run("generate", "--from", out, "--model", "tiny")
    assert code == 0
    with Image.open(out) as one, Image.open(again) as other:
        assert one.tobytes() == other.tobytes()
    code, _, err = run("generate", "a star", "--lora", "style:strong", *size)
    assert code == 2
    assert "'strong' is not a strength" in err
