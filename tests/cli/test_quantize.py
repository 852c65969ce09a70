"""`octavo quantize` and `octavo recipes` as a user meets them: paths on stdout, the rest on stderr."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.cli import main as cli
from octavo.quantize import load_recipe, read_recipe, recipe_names
from tests.tiny_tree import write_tiny_tree

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--steps", "2", "--size", "64x64", "--calibration-size", "2", "--device", "cpu")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("OCTAVO_MODELS", str(write_tiny_tree(tmp_path / "models")))

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["octavo", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return (exit_.value.code if isinstance(exit_.value.code, int) else 0), out, err

    return run


def test_a_file_comes_with_a_summary(run: Run) -> None:
    code, out, err = run("quantize", "tiny", "fp8.safetensors", "--recipe", "row", *QUICK)
    assert (code, out) == (0, "fp8.safetensors\n")
    assert Path("fp8.safetensors").is_file()
    assert "recipe row" in err
    assert "100.0% of the linear weights in FP8" in err
    assert "not judged: no pictures were asked for" in err


def test_both_formats_with_a_share_in_16_bits_and_a_gate(run: Run) -> None:
    words = ("--format", "both", "--keep-16bit", "10%", "--min-psnr", "5", "--gate", "1")
    code, out, err = run("quantize", "tiny", "fp8.safetensors", *words, *QUICK)
    assert code == 0, err
    assert out == "fp8.safetensors\nfp8-comfy.safetensors\n"
    assert "most sensitive layers" in err
    assert "in 16 bits: " in err
    assert "over 1 picture, at least 5 asked for" in err
    assert run("info", "fp8.safetensors")[1].count("recipe best") == 1


def test_quiet_prints_the_path_alone(run: Run) -> None:
    words = ("quantize", "tiny", "fp8.safetensors", "--recipe", "row", "--quiet", *QUICK)
    assert run(*words) == (0, "fp8.safetensors\n", "")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("nothing", "a.safetensors"), "There is no model 'nothing'"),
        (("tiny", "a.safetensors", "--recipe", "none"), "There is no recipe 'none'"),
        (("tiny", "a.safetensors", "--budget", "much"), "--budget much: write the size of a file"),
        (
            ("tiny", "a.safetensors", "--keep-16bit", "0.05"),
            "--keep-16bit 0.05: write a share of the weights in percent",
        ),
        (("tiny", "a.safetensors", "--size", "wide"), "--size wide: write width x height"),
        (("tiny", "a.safetensors", "--steps", "0"), "steps 0 is out of range"),
        (("tiny", "a.safetensors", "--format", "gguf"), "There is no file format 'gguf'"),
        (("tiny", "a.safetensors", "--guidance", "-1"), "guidance_scale -1.0 is out of range"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_message(run: Run, words: tuple[str, ...], complaint: str) -> None:
    before = sorted(Path().rglob("*"))
    code, out, err = run("quantize", *words)
    assert (code, out) == (2, "")
    assert complaint in err
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == before


def test_recipes_are_listed_and_shown_as_they_can_be_given_back(run: Run) -> None:
    code, out, _ = run("recipes")
    assert code == 0
    for name in recipe_names():
        assert f"{name} " in out
        assert read_recipe(run("recipes", name)[1], name) == load_recipe(name)
    code, _, err = run("recipes", "none")
    assert code == 2
    assert "There is no recipe 'none'" in err
