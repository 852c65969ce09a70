"""`octavo evaluate` and `octavo compare` as a user meets them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from octavo.cli import main as cli
from tests.tiny_tree import write_tiny_tree

pytest.importorskip("torchmetrics", reason="the eval extra is not installed")

Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tree(tmp_path_factory.mktemp("tiny") / "models")


@pytest.fixture
def run(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder with two prompts: (exit code, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OCTAVO_MODELS", str(tree))
    monkeypatch.setenv("COLUMNS", "200")
    Path("prompts.txt").write_text('a red star\na blue circle with the word "STAR"\n', "utf-8")

    def run(*words: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["octavo", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0), out.splitlines(), err

    return run


SMALL = ("--prompts", "prompts.txt", "--steps", "2", "--size", "32", "--no-ocr", "--velocity-prompts", "1")


def test_models_are_compared_resumed_and_put_beside_pictures_made_elsewhere(run: Run) -> None:
    words = ("evaluate", "16-bit=tiny", "fp8=tiny@force-fp8+plain-w8a8", "--report", "out", *SMALL)
    code, out, err = run(*words)
    assert (code, out) == (0, ["out/report.html"])
    assert "fp8" in err
    report = json.loads(Path("out/report.json").read_text())
    assert report["command"].startswith("octavo evaluate 16-bit=tiny")
    assert report["settings"]["steps"] == 2
    fp8 = report["columns"][1]
    assert fp8["facts"]["fp8_share"] > 0.5
    assert 0 < fp8["velocity"]["whole"] < 0.3
    drawn = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.png")}
    assert len(drawn) == 4

    assert run(*words, "--quiet") == (0, ["out/report.html"], "")
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.png")} == drawn

    code, _, err = run(*words, "--guidance", "2")
    assert code == 2
    assert "guidance_scale was" in err
    assert "--restart" in err

    Path("elsewhere").mkdir()
    Image.new("RGB", (40, 40), "red").save("elsewhere/1.png")
    code, out, _ = run("compare", "out", "FLUX=elsewhere", "--report", "together", "--no-ocr")
    assert (code, out) == (0, ["together/report.html"])
    names = [column["name"] for column in json.loads(Path("together/report.json").read_text())["columns"]]
    assert names == ["16-bit", "fp8", "FLUX"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("evaluate", "tiny", "tiny", "--report", "out", *SMALL), "NAME=MODEL"),
        (("evaluate", "none", "--report", "out", *SMALL), "none"),
        (("evaluate", "tiny@warp", "--report", "out", *SMALL), "warp"),
        (("evaluate", "tiny", "--report", "out", *SMALL, "--size", "big"), "--size big"),
        (("evaluate", "tiny", "--report", "out", "--prompts", "none.txt"), "none.txt"),
        (("evaluate", "tiny", "--report", "out", *SMALL, "--lpips", "nowhere"), "alexnet.safetensors"),
        (("evaluate", "tiny", "--report", "prompts.txt/x", *SMALL), "prompts.txt/x"),
        (("compare", "nowhere", "--report", "out"), "'nowhere' is no report"),
        (("compare", "diffusers:x", "--report", "out"), "--prompts FILE"),
        (("compare", "diffusers:x", "--report", "out", "--prompts", "none.txt"), "none.txt"),
    ],
)
def test_mistakes_are_told_in_one_message(run: Run, words: tuple[str, ...], told: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, [])
    assert told in err
    assert "Traceback" not in err
