"""--speed of the commands that draw."""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from octavo.graph.runner import Workshop
from octavo.pipeline.image import read_settings
from octavo.pipeline.run import Run, Watch, solve
from octavo.pipeline.shelf import LoadSettings, Shelf
from octavo.pipeline.speed import EXACT, SPEEDS
from tests.cli.test_generate import Run as Command
from tests.cli.test_generate import run, tree
from tests.cli.test_run import EXAMPLES, SMALL
from tests.cli.test_run import MODEL as MODEL_FILE
from tests.cli.test_run import run as run_workflow
from tests.graph.nodes.runs import context_with, write_recorded_model
from tests.graph.nodes.test_sampling import MODEL, ModelLink, guider, walk

__all__ = ["run", "run_workflow", "tree"]  # fixtures


def test_a_picture_says_its_speed_and_is_repeated_at_it(run: Command) -> None:
    code, _, err = run("a red star", "--seed", "1", "--steps", "12", "--speed", "fast", "-o", "one.png")
    assert code == 0
    assert "of 12 evaluations were forecast" in err
    assert read_settings(Path("one.png"))["speed"] == "fast"
    assert run("--from", "one.png", "--steps", "12", "-o", "two.png")[0] == 0
    with Image.open("one.png") as one, Image.open("two.png") as two:
        assert one.tobytes() == two.tobytes()
    assert read_settings(Path("one.png")) == read_settings(Path("two.png"))
    assert run("--from", "one.png", "--speed", "exact", "-o", "three.png")[0] == 0
    assert read_settings(Path("three.png"))["speed"] == "exact"


def test_a_speed_that_is_none_is_refused_with_those_there_are(run: Command) -> None:
    code, out, err = run("a red star", "--speed", "fastest")
    assert (code, out) == (2, [])
    assert "choose exact, balanced, fast" in err


def test_all_runs_of_a_workflow_have_the_speed_of_their_workshop(tmp_path: Path) -> None:
    context = context_with(write_recorded_model(tmp_path))
    seen: list[Run] = []

    def watched(run: Run, watch: Watch) -> torch.Tensor:
        seen.append(run)
        return solve(run, watch)

    for speed in (None, SPEEDS["fast"]):
        there = replace(context, solve=watched, speed=speed)
        walk(there, guider(ModelLink.of(there.shelf.diffusion_model(MODEL))))
    assert [each.speed for each in seen] == [EXACT, SPEEDS["fast"]]
    shelf = Shelf(LoadSettings(device="cpu"))
    assert Workshop(shelf=shelf, input_dir=tmp_path, output_dir=tmp_path, temp_dir=tmp_path).speed is EXACT


def test_a_workflow_is_run_at_a_speed_and_says_what_was_forecast(run_workflow: Command) -> None:
    (example,) = (path for path in EXAMPLES if path.stem == "sd3.5-large-fp8")
    words = (example, "--set", MODEL_FILE, "--set", "Sampler.steps=14", *SMALL, "--seed", "3", "--verbose")
    for speed, forecast in (("exact", False), ("fast", True)):
        code, _, err = run_workflow(*words, "--speed", speed)
        assert code == 0, err
        assert (f"(speed '{speed}')" in err) is forecast
    assert run_workflow(*words, "--speed", "fastest")[0] == 2
