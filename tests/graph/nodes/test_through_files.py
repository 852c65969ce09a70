"""A workflow from a file to a file, with the embedded model's VAE."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from octavo.graph.cache import Cache
from octavo.graph.context import Context
from octavo.graph.execute import Executor
from octavo.graph.nodes import NODES
from octavo.graph.workflow import validate
from octavo.pipeline.run import solve
from octavo.pipeline.shelf import LoadSettings, Shelf
from tests.graph.compare import FixedLists
from tests.graph.nodes.runs import use

PROMPT: dict[str, Any] = {
    "1": use("CheckpointLoaderSimple", ckpt_name="octavo-demo.safetensors"),
    "2": use("LoadImage", image="a.png"),
    "3": use("VAEEncode", pixels=["2", 0], vae=["1", 2]),
    "4": use("VAEDecode", samples=["3", 0], vae=["1", 2]),
    "5": use("SaveImage", images=["4", 0], filename_prefix="%width%/again"),
}
RED, BLUE = (220, 40, 40), (40, 80, 220)


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(LoadSettings(device="cpu", dtype="float32"))


def test_a_picture_survives_encoding_and_is_made_anew_only_when_its_file_changes(tmp_path: Path, shelf: Shelf) -> None:
    folders = {f"{kind}_dir": tmp_path / kind for kind in ("input", "output", "temp")}
    (tmp_path / "input").mkdir()
    context = Context(shelf=shelf, solve=solve, **folders, prompt=PROMPT)
    executor = Executor(Cache())

    def run(colour: tuple[int, int, int]) -> tuple[dict[str, str], set[str]]:
        """Its one file, and the nodes that were taken from the cache."""
        Image.new("RGB", (64, 48), colour).save(tmp_path / "input" / "a.png")
        lists = FixedLists(tmp_path, checkpoints=shelf.names("checkpoints"))
        events: list[tuple[str, dict[str, Any]]] = []
        shown = executor.run(validate(PROMPT, NODES, lists), context, lambda *event: events.append(event))
        (file,) = shown["5"]["images"]
        return file, {node for kind, data in events if kind == "execution_cached" for node in data["nodes"]}

    file, cached = run(RED)
    assert file == {"filename": "again_00001_.png", "subfolder": "64", "type": "output"}
    assert not cached
    with Image.open(tmp_path / "output" / "64" / "again_00001_.png") as image:
        levels = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(48, 64, 3)
        assert json.loads(image.text["prompt"]) == PROMPT
    # The embedded VAE gives a colour of its small domain back within a few levels.
    assert (levels.mean((0, 1)) - torch.tensor(RED)).abs().max() < 16

    same, cached = run(RED)
    assert same == file
    assert cached == {"1", "2", "3", "4", "5"}
    other, cached = run(BLUE)
    assert other["filename"] == "again_00002_.png"
    assert cached == {"1"}
