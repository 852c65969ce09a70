"""`--threads` is taken, is refused where it means nothing, and what is taken is said."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from octavo.cli import threads
from octavo.cli.main import app
from octavo.errors import RequestError
from octavo.pipeline.components import Components
from octavo.placement.threads import Threads


def model(device: str, weights: int = 10) -> Components:
    with torch.device("meta"):
        skeleton = nn.Linear(weights, 1, bias=False)
    stand_in: Any = SimpleNamespace(device=torch.device(device), mmdit=SimpleNamespace(skeleton=skeleton))
    return cast(Components, stand_in)


def test_threads_on_a_gpu_are_refused() -> None:
    threads.take_threads(None, model("cuda"))
    with pytest.raises(RequestError, match=r"about CPUs.*'cuda'"):
        threads.take_threads(2, model("cuda"))


@pytest.mark.parametrize(("weights", "measured"), [(10, False), (threads.LARGE, True)])
def test_only_large_models_are_worth_a_trial(monkeypatch: pytest.MonkeyPatch, weights: int, measured: bool) -> None:
    asked: list[bool] = []

    def pick(count: int | None, *, measure: bool) -> Threads:
        assert count is None
        asked.append(measure)
        return Threads(count=1, why="said so")

    monkeypatch.setattr("octavo.placement.threads.pick_threads", pick)
    threads.take_threads(None, model("cpu", weights))
    assert asked == [measured]


def test_generate_takes_a_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("octavo.placement.threads.use_threads", lambda picked: taken.append(picked.count))
    words = ["generate", "a red star", "--steps", "1", "--seed", "1", "--threads", "1", "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "star.png")])
    assert done.exit_code == 0, done.output
    assert taken == [1]


def test_the_device_s_page_says_how_many_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "octavo.placement.threads.pick_threads", lambda: Threads(count=3, why="as a trial on this machine found")
    )
    done = CliRunner().invoke(app, ["info", "--device", "cpu"], env={"COLUMNS": "200"})
    assert "3 threads (as a trial on this machine found)" in done.output
