"""`octavo plan`: tables for cards that are not here, of models that are not here either."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo.checkpoint.folders import EMBEDDED
from octavo.cli import main as cli
from octavo.placement.cards import CARDS

Run = Callable[..., tuple[int, str, str]]
GB = 10**9


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.setenv("OCTAVO_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["octavo", "plan", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


def test_one_card_is_told_part_by_part_and_stage_by_stage_and_marked_as_predicted(run: Run) -> None:
    code, out, _ = run("--card", "rtx-4070-12gb", "--vram", "6.5GB", "--steps", "20")
    assert code == 0
    assert "SD3.5 Large, 1024x1024 pixels, 20 steps" in out
    assert "May use 6.50 GB" in out
    assert "datasheet × 0.85" in out
    for word in ("CLIP-L", "CLIP-G", "T5", "MMDiT", "VAE", "encode", "modulation", "denoise", "decode"):
        assert f"\n{word} " in out
    assert "Predicted: " in out
    assert "nothing was measured" in out


def test_all_cards_are_told_one_line_each(run: Run) -> None:
    code, out, _ = run("--card", "all", "--format", "bf16", "--vram", "3GB")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for name in CARDS:
        assert "blocks pass at each step" in lines[name] or "does not fit" in lines[name]


def test_without_a_gpu_and_without_a_card_all_are_told(run: Run) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert run("--json")[1] == run("--card", "all", "--json")[1]


def test_json_has_every_figure_of_the_page(run: Run) -> None:
    code, out, _ = run("--model", "turbo", "--card", "h200", "--vram", "50%", "--batch", "2", "--json")
    page = json.loads(out)
    assert code == 0
    assert page["model"] == "SD3.5 Large Turbo"
    assert page["budget"] == pytest.approx(CARDS["h200"].memory / 2, abs=1)
    assert page["work"]["rows"] == 2
    assert page["work"]["steps"] == 4
    assert page["work"]["prompts"] == 1
    assert set(page["stages"]) == {"encode", "modulation", "denoise", "decode"}


def test_guidance_decides_how_many_rows_a_step_has(run: Run) -> None:
    rows = [
        json.loads(run("--card", "h200", "--guidance", scale, "--json")[1])["work"]["rows"] for scale in ("1", "4.5")
    ]
    assert rows == [1, 2]


def test_too_little_memory_is_refused_with_the_least_that_would_do(run: Run) -> None:
    code, _, err = run("--card", "rtx-4060-8gb", "--vram", "500MB")
    assert code == 2
    assert "are needed" in err
    least = json.loads(run("--card", "all", "--vram", "500MB", "--json")[1])["rtx-4060-8gb"]["least"]
    assert run("--card", "rtx-4060-8gb", "--vram", str(least))[0] == 0
    assert run("--card", "rtx-4060-8gb", "--vram", str(least - 1))[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--card", "rtx-9999"), "rtx-4070-12gb"), (("--format", "int4"), "fp8 or bf16"),
        (("--vram", "six"), "no size"),
        (("--size", "huge"), "width x height"), (("--steps", "0"), "steps=0"), (("--model", "nowhere"), "no model"),
        (("--batch", "0"), "rows=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(run: Run, words: tuple[str, ...], said: str) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert said in err.replace("\n", " ")
    assert "Traceback" not in err


def test_a_models_file_is_planned_from_its_headers_with_the_parts_that_belong_to_it(run: Run) -> None:
    code, out, _ = run("--model", str(EMBEDDED / "checkpoints" / "octavo-demo.safetensors"), "--card", "rtx-4060")
    assert code == 0
    assert "Octavo's embedded model, 128x128 pixels" in out
    assert "taken as released" not in out


def test_parts_that_are_nowhere_are_taken_as_released_which_is_said(run: Run, tmp_path: Path) -> None:
    source = EMBEDDED / "checkpoints" / "octavo-demo.safetensors"
    from safetensors.torch import load_file

    path = tmp_path / "alone.safetensors"
    weights = load_file(source)
    save_file({k: v for k, v in weights.items() if k.startswith("model.diffusion_model.")}, path)
    code, out, _ = run("--model", str(path), "--card", "rtx-4060")
    assert code == 0
    assert "Not found, taken as released" in out
    assert "T5" in out
