"""--vram on the command line, on a machine without a GPU: refused with a reason; what `octavo info` tells on one."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from octavo.cli.main import main
from octavo.pipeline import assemble
from octavo.pipeline.assemble import EMBEDDED_MODEL, load

COMMANDS = {
    "generate": ("a star",),
    "run": ("examples/workflows/txt2img.json",),
    "refine": ("picture.png", "a star", "--region", "0,0,64,64"),
    "serve": ("--port", "0"),
    "evaluate": ("embedded", "--report", "out"),
}


def called(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["octavo", *words])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_cpu_has_no_memory_of_its_own_to_plan(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = COMMANDS[command]
    if command == "refine":
        Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
        words = (str(tmp_path / "picture.png"), *words[1:])
    assert called(monkeypatch, command, *words, "--device", "cpu", "--vram", "6GB") == 2
    assert "--vram 6GB is about a GPU's memory" in capsys.readouterr().err.replace("\n", " ")


def test_info_tells_where_a_model_would_be_on_this_machines_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("octavo.devices.pick_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(assemble, "load", lambda *_, **__: load(device="cpu", vram="90MB"))
    assert called(monkeypatch, "info", str(EMBEDDED_MODEL)) == 0
    assert "Memory here: " in capsys.readouterr().out
