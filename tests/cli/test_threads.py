"""`--threads` is taken by every command that computes for long, is refused where it means nothing, and is told."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from octavo.cli.main import app, main
from octavo.errors import RequestError
from octavo.pipeline.assemble import EMBEDDED_MODEL
from octavo.placement import threads
from octavo.placement.threads import Threads, is_large, take_threads
from octavo.server import works
from octavo.server.settings import gather
from octavo.server.state import State

COMMANDS = {
    "generate": ("a star",),
    "run": ("examples/workflows/txt2img.json",),
    "refine": ("picture.png", "a star", "--region", "0,0,64,64"),
    "serve": ("--port", "0"),
    "evaluate": ("embedded", "--report", "out"),
    "compare": ("pictures", "--report", "out"),
    "quantize": (str(EMBEDDED_MODEL), "out.safetensors"),
    "train lora": ("--data", ".", "--out", "out.safetensors"),
    "train distil": ("student.safetensors", "--teacher", "octavo-demo", "--out", "out.safetensors"),
    "bench": (),
}


class TakenError(Exception):
    """A command has come to the threads; further it need not go."""


def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, *more: str) -> int:
    """Call `octavo COMMAND` as a shell does: the exit code."""
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    words = (str(picture) if word == "picture.png" else word for word in COMMANDS[command])
    monkeypatch.setattr(sys, "argv", ["octavo", *command.split(), *words, "--device", "cpu", *more])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_number_that_cannot_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, tmp_path, command, "--threads", "0") == 2
    assert "--threads 0: choose 1 to" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "serve"])
def test_every_command_takes_a_number_before_it_works(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def use(picked: Threads) -> None:
        raise TakenError(picked.count)

    monkeypatch.setattr(threads, "use_threads", use)
    with pytest.raises(TakenError) as taken:
        call(monkeypatch, tmp_path, command, "--threads", "3")
    assert taken.value.args == (3,)


def test_threads_on_a_gpu_are_refused() -> None:
    take_threads(None, torch.device("cuda"))
    with pytest.raises(RequestError, match=r"about CPUs.*'cuda'"):
        take_threads(2, torch.device("cuda"))


@pytest.mark.parametrize(("weights", "large"), [(10, False), (threads.LARGE, True)])
def test_only_large_models_are_worth_a_trial(weights: int, large: bool) -> None:
    with torch.device("meta"):
        assert is_large(nn.Linear(weights, 1, bias=False)) == large


@pytest.fixture
def other_number() -> Iterator[int]:
    """A number of threads that torch does not take now, nor after the test."""
    before = torch.get_num_threads()
    yield before + 1
    torch.set_num_threads(before)


def test_a_server_s_device_thread_is_the_one_that_takes_them(other_number: int, tmp_path: Path) -> None:
    folders = {"data_dir": tmp_path / "data", "output_dir": tmp_path / "output"}
    settings = gather({**folders, "device": "cpu"}, environment={"OCTAVO_THREADS": str(other_number)})
    state = State(settings)
    try:
        loaded = works.load(state)
        assert loaded.batcher is not None
        assert loaded.batcher.do(torch.get_num_threads) == other_number
        loaded.close()
    finally:
        state.queue.close()


def test_a_server_s_number_may_stand_in_its_file(tmp_path: Path) -> None:
    (tmp_path / "octavo.toml").write_text("threads = 3\n")
    assert gather({}, environment={}, file=tmp_path / "octavo.toml").threads == 3
    assert gather({"threads": 2}, environment={"OCTAVO_THREADS": "4"}, file=tmp_path / "octavo.toml").threads == 2
    assert gather({}, environment={}).threads is None


def test_the_device_s_page_says_how_many_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "octavo.placement.threads.pick_threads", lambda: Threads(count=3, why="as a trial on this machine found")
    )
    done = CliRunner().invoke(app, ["info", "--device", "cpu"], env={"COLUMNS": "200"})
    assert "3 threads (as a trial on this machine found)" in done.output
