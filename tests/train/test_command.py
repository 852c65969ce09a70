"""`octavo train demo` from nothing to files, on a very small recipe."""

from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from octavo.cli.train import train
from octavo.errors import RequestError
from octavo.evaluate import checker
from octavo.train.autoencoder import AutoencoderRecipe
from octavo.train.demo import DemoRecipe
from octavo.train.pictures import learning_curve

TINY = DemoRecipe(
    depth=1, size=32, batch=2, steps=1, pool={"plain": 4}, autoencoder=AutoencoderRecipe(size=16, batch=4)
)


@pytest.mark.gradients
def test_a_run_gives_a_checker_a_sheet_a_curve_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.train.demo.PRESETS", {"cpu": TINY})
    monkeypatch.setattr(checker, "train_classifier", partial(checker.train_classifier, pictures=16, steps=2))
    monkeypatch.setattr("octavo.train.loop.train.__kwdefaults__", {**_loop_defaults(), "log_every": 1})
    run, tree = tmp_path / "run", tmp_path / "models"
    for extra in (["--stage", "0"], ["--stage", "1", "--export-to", str(tree)]):
        result = CliRunner().invoke(train, ["demo", "--minutes", "0.01", "--out", str(run), *extra])
        assert result.exit_code == 0, result.output
    for name in ("vae.safetensors", "checker.safetensors", "curve.jsonl", "curve.png", "sheet-stage-1.png"):
        assert (run / name).exists(), name
    assert (tree / "checkpoints" / "octavo-demo.safetensors").exists()
    assert "bytes" in result.output


def _loop_defaults() -> dict[str, object]:
    from octavo.train import loop

    return dict(loop.train.__kwdefaults__)


def test_a_curve_of_a_single_step_can_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "curve.jsonl").write_text('{"phase": "vae", "step": 1, "seconds": 0.6, "loss": 0.5, "norm": 1.0}\n')
    assert learning_curve(tmp_path).size == (720, 400)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--stage", "1"], "run stage 0 first"),
        (["--stage", "0", "--preset", "abacus"], "cpu, h200"),
        (["--stage", "0", "--device", "abacus"], "cpu or cuda"),
    ],
)
def test_wrong_use_is_told_what_to_do(extra: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(train, ["demo", "--minutes", "1", "--out", str(tmp_path), *extra])
    assert isinstance(result.exception, RequestError)
    assert said in str(result.exception)
