"""FP8 on the command line: our options and ComfyUI's spellings of them do what they say."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import main as cli
from octavo.cli.arithmetic import plain_words
from octavo.errors import RequestError
from octavo.fp8 import E4M3FN, E5M2
from octavo.pipeline import assemble
from tests.tiny_tree import write_tiny_tree

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tree(tmp_path_factory.mktemp("tiny") / "models")


@pytest.fixture
def loaded() -> list[Any]:
    """The models that the command has loaded."""
    return []


@pytest.fixture
def run(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loaded: list[Any]
) -> Run:
    """Draw with the tiny model: (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OCTAVO_MODELS", str(tree))
    monkeypatch.setenv("OCTAVO_MODEL", "tiny")
    monkeypatch.setenv("COLUMNS", "300")
    load = assemble.load
    monkeypatch.setattr(
        assemble, "load", lambda *names, **options: loaded.append(load(*names, **options)) or loaded[-1]
    )

    def run(*words: str) -> tuple[int, str]:
        words = ("octavo", "generate", "--steps", "1", "--size", "32", "--device", "cpu", *words)
        monkeypatch.setattr(sys, "argv", list(words))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("flags", "unet", "text"),
    [
        (["--force-fp8"], E4M3FN, None),
        (["--fp8_e4m3fn-unet"], E4M3FN, None),
        (["--fp8_e5m2-unet"], E5M2, None),
        (["--force-fp8-text-encoders"], None, E4M3FN),
        (["--fp8_e4m3fn-text-enc"], None, E4M3FN),
        (["--fp8_e5m2-text-enc", "--fp8_e4m3fn-unet"], E4M3FN, E5M2),
    ],
    ids=str,
)
def test_flags_put_parts_into_fp8(run: Run, loaded: list[Any], flags: list[str], unet: object, text: object) -> None:
    assert run("a red star", *flags)[0] == 0
    (components,) = loaded
    for part, fmt in [(components.mmdit, unet), *((encoder, text) for encoder in components.encoders)]:
        assert bool(part.forced_linears) == bool(part.fp8_linears) == (fmt is not None)
        specs = {module.spec.format for module in part().modules() if hasattr(module, "spec")}
        assert specs == ({fmt} if fmt else set())


@pytest.mark.parametrize("spelling", [["--fast"], ["--fast", "fp8_matrix_mult"]], ids=str)
def test_fast_lets_inputs_be_rounded(run: Run, loaded: list[Any], spelling: list[str]) -> None:
    assert run(*spelling, "a red star", "--force-fp8")[0] == 0
    layers = [m for m in loaded[0].mmdit().modules() if getattr(m, "choice", None) is not None]
    assert layers
    for layer in layers:
        assert "only in mode 'fast'" not in " ".join(layer.choice.reasons.values())


def test_fast_without_fp8_weights_says_that_it_does_nothing(run: Run) -> None:
    code, err = run("a red star", "--fast")
    assert code == 0
    assert "'tiny.safetensors' has no FP8 weights" in err
    assert "--force-fp8" in err


def test_claiming_fp8_compute_for_a_cpu_is_said_to_change_nothing(run: Run) -> None:
    assert "on 'cpu' it changes nothing" in run("a red star", "--force-fp8", "--supports-fp8-compute")[1]


def test_verbose_tells_how_each_part_multiplies(run: Run) -> None:
    code, err = run("a red star", "--force-fp8", "--verbose")
    assert code == 0
    assert "diffusion model (tiny.safetensors): " in err
    assert "linears in FP8" not in run("a red star", "--quiet", "--verbose")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fp8_e5m2-unet", "--force-fp8"], "choose one of them"),
        (["--fp8_e5m2-text-enc", "--fp8_e4m3fn-text-enc"], "choose one of them"),
        (["--fast", "autotune"], "ComfyUI's alone"),
        (["--backend", "plain-w8a8"], "has none. Use an FP8 file of it, or --force-fp8"),
        (["--backend", "plainw8a8", "--force-fp8"], "Did you mean 'plain-w8a8'"),
        (["--backend", "torch", "--force-fp8"], "runs on cuda, this is cpu"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said(run: Run, words: list[str], message: str) -> None:
    code, err = run("a red star", *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_only_comfyuis_words_after_fast_are_taken_away() -> None:
    words = ["generate", "fp8_matrix_mult", "--fast", "fp8_matrix_mult", "a star", "--fast", "--seed", "1"]
    assert plain_words(words) == ["generate", "fp8_matrix_mult", "--fast", "a star", "--fast", "--seed", "1"]
    assert plain_words(["--fast", "a star", "autotune"]) == ["--fast", "a star", "autotune"]
    with pytest.raises(RequestError, match="cublas_ops is ComfyUI's alone"):
        plain_words(["--fast", "fp8_matrix_mult", "cublas_ops"])
