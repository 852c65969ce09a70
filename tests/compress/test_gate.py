"""The gate measures what it says, and never keeps silent where it does not measure."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import octavo
from octavo.compress import gate
from octavo.compress.gate import Verdict, compare, quantized_components
from octavo.compress.job import quantize_checkpoint
from octavo.fp8 import Fp8Linear
from tests.compress.small import model, settings


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    model(root)
    return root


def picture(level: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4, 3), level, dtype=np.uint8))


def test_decibels_are_those_of_the_definition() -> None:
    """PSNR of pictures that differ by d everywhere is 20 log10(255 / d)."""
    decibels = compare([picture(100), picture(7)], [picture(105), picture(7)])
    assert decibels == (pytest.approx(20 * math.log10(255 / 5)), gate.MOST_DECIBELS)


def test_a_verdict_passes_at_its_bound_and_without_one() -> None:
    assert Verdict(decibels=(30.0, 40.0), bound=35.0).passed
    assert not Verdict(decibels=(30.0, 39.0), bound=35.0).passed
    assert Verdict(decibels=(1.0,)).passed
    assert Verdict(bound=35.0, skipped="no memory").passed


def test_a_calibrated_file_is_judged_in_fp8_arithmetic(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "best.safetensors"
    (written,) = quantize_checkpoint("tiny", out, settings(tree, gate=2, min_psnr=20.0)).files
    assert len(written.verdict.decibels) == 2
    assert 20 <= written.verdict.mean < gate.MOST_DECIBELS
    assert "over 2 pictures, at least 20 asked for" in str(written.verdict)
    original = octavo.load("tiny", models_dir=tree, device="cpu")
    theirs = quantized_components(out, original, settings(tree), rounds_inputs=True)
    paths = {
        layer.choice.backend.name for layer in theirs.mmdit().modules() if isinstance(layer, Fp8Linear) and layer.choice
    }
    assert gate.ARITHMETIC in paths


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"gate": 0}, "no pictures were asked for"),
        ({"gate": None, "recipe": "row"}, "no pictures were asked for"),
        ({"gate": None, "recipe": "row", "min_psnr": 1.0, "low_memory": True}, "--low-memory was given"),
    ],
)
def test_a_gate_that_is_not_used_says_why(tree: Path, tmp_path: Path, given: dict[str, object], says: str) -> None:
    asked = settings(tree, **{"recipe": "row", **given})
    (written,) = quantize_checkpoint("tiny", tmp_path / "a.safetensors", asked).files
    assert says in str(written.verdict)


def test_a_model_beyond_memory_is_not_judged(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "free_bytes", lambda _device: 1000)
    asked = settings(tree, recipe="row", gate=2)
    (written,) = quantize_checkpoint("tiny", tmp_path / "a.safetensors", asked).files
    assert "GB of memory to draw, and 0.0 GB are free" in str(written.verdict)


def test_a_model_without_encoders_is_not_judged(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "models" / "checkpoints" / "alone.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes((tree / "checkpoints" / "tiny.safetensors").read_bytes())
    asked = settings(tmp_path / "models", recipe="row", gate=2)
    (written,) = quantize_checkpoint("alone", tmp_path / "a.safetensors", asked).files
    assert "no pictures can be drawn. 'alone.safetensors' has no text encoders" in str(written.verdict)
