"""--attention, --compile and --graphs: they reach the model, or are refused with the reason and what to do."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.cli import main as cli
from octavo.errors import RequestError
from octavo.pipeline.shelf import LoadSettings, Shelf
from octavo.server.settings import gather
from tests.tiny_tree import write_tiny_tree

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tree(tmp_path_factory.mktemp("tiny") / "models")


@pytest.fixture
def run(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Draw with the tiny model: (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OCTAVO_MODELS", str(tree))
    monkeypatch.setenv("COLUMNS", "300")

    def run(*words: str) -> tuple[int, str]:
        wishes = ("--model", "tiny", "--steps", "2", "--size", "32", "--device", "cpu", "--verbose")
        monkeypatch.setattr(sys, "argv", ["octavo", "generate", "a red star", *wishes, *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0), capsys.readouterr().err

    return run


def test_an_attention_is_taken_by_name(run: Run) -> None:
    code, told = run("--attention", "plain-int8")
    assert code == 0
    assert "attention: plain-int8" in told
    assert "Attention of up to 64×64 tokens: plain-int8" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--attention", "triton-fp8"], "'tiny.safetensors': --attention triton-fp8: runs on cuda, this is cpu."),
        (["--attention", "sdap"], "There is no attention 'sdap'. Use one of sdpa, "),
        (["--compile"], "'tiny.safetensors': --compile: it needs a C++ compiler (g++ or clang++), and there is none."),
    ],
    ids=str,
)
def test_what_cannot_serve_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    code, said = run(*words)
    assert code != 0
    assert told in said
    assert "Traceback" not in said


def test_graphs_say_why_there_are_none(run: Run) -> None:
    code, told = run("--graphs")
    assert code == 0
    assert "CUDA graphs: captured at call 2 of a shape" in told
    assert "Not captured as a CUDA graph: CUDA graphs need a CUDA device, this is cpu." in told
    assert "CUDA graph" not in run("--no-graphs")[1]


def test_servers_take_them_too(tree: Path) -> None:
    found = gather({}, environment={"OCTAVO_ATTENTION": "plain-fp8", "OCTAVO_COMPILE": "yes", "OCTAVO_GRAPHS": "no"})
    assert found.loading == {"attention": "plain-fp8", "compile": True, "graphs": False}
    settings = LoadSettings(models_dir=tree, device="cpu", attention="fa3")
    with pytest.raises(RequestError, match=r"^--attention fa3: runs on cuda, this is cpu\.$"):
        Shelf(settings)
