"""The whole job on a tiny model: what it writes, and that it goes on after being stopped, to the same bytes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import octavo
from octavo.checkpoint import load_mmdit
from octavo.checkpoint.save import save_safetensors
from octavo.compress.job import quantize_checkpoint
from octavo.compress.progress import Progress
from octavo.fp8 import Fp8Linear, step_group
from octavo.quantize import load_recipe, quantize_layer, read_recipe
from octavo.sampling import schedule
from tests.compress.small import model, settings

MMDIT = "model.diffusion_model."


class Stopped(BaseException):
    """As Ctrl-C, or any end that is no fault of the job's."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    model(root)
    return root


@pytest.fixture(scope="module")
def finished(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Progress]]:
    """The file of an undisturbed job with calibration, and all that it reported."""
    with torch.inference_mode():
        torch.set_num_threads(1)
        out, reports = tmp_path_factory.mktemp("whole") / "best.safetensors", list[Progress]()
        quantize_checkpoint("tiny", out, settings(tree), watch=reports.append)
    return out, reports


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        said: dict[str, str] = file.metadata()
    return said


def test_a_recipe_without_calibration_is_followed_to_the_letter(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "row.safetensors"
    (written,) = quantize_checkpoint("tiny", out, settings(tree, recipe="row")).files
    source, result = load_file(tree / "checkpoints" / "tiny.safetensors"), load_file(out)
    rule = load_recipe("row").default
    for name, tensor in source.items():
        matrix = name.startswith(MMDIT) and name.endswith("weight") and tensor.ndim == 2
        if matrix:
            expected = quantize_layer(name, tensor, None, rule, None).weight
            assert torch.equal(result[name].view(torch.uint8), expected.q.view(torch.uint8))
            assert torch.equal(result[f"{name}_scale"], expected.scale)
        else:
            assert torch.equal(result[name], tensor)
    assert written.fp8_weights == written.linear_weights
    assert written.kept == ()
    assert list(tmp_path.rglob("*")) == [out.parent, out]


def test_the_header_says_how_the_file_was_made(finished: tuple[Path, list[Progress]]) -> None:
    said = header(finished[0])
    assert read_recipe(said["octavo.recipe"], "the file") == load_recipe("best")
    assert len(said["octavo.calibration"]) == 64
    assert said["octavo.version"] == octavo.__version__
    layers = json.loads(said["octavo.quantization"])["layers"]
    assert layers[f"{MMDIT}joint_blocks.0.x_block.mlp.fc2"]["low_rank"] == 16
    assert f"{MMDIT}final_layer.linear" not in layers


def test_the_file_loads_and_draws(tree: Path, finished: tuple[Path, list[Progress]]) -> None:
    fp8 = [layer for layer in load_mmdit(finished[0]).modules() if isinstance(layer, Fp8Linear)]
    assert fp8
    components = octavo.load(finished[0], models_dir=tree, device="cpu", backend="plain-w8a8")
    request = octavo.GenerateRequest(prompt="a red star", steps=1, width=64, height=64, seed=0)
    assert octavo.generate(components, request)


def test_inputs_that_drift_get_a_scale_for_each_part_of_the_schedule(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "static.safetensors"
    quantize_checkpoint("tiny", out, settings(tree, recipe="static", steps=4))
    mmdit = load_mmdit(out)
    fc2 = mmdit.joint_blocks[0].x_block.mlp.fc2
    fc1 = mmdit.joint_blocks[0].x_block.mlp.fc1
    assert isinstance(fc1, Fp8Linear)
    assert isinstance(fc2, Fp8Linear)
    assert fc1.input_scale is not None
    assert fc2.input_scale is not None
    assert fc1.input_scale.shape == ()
    assert fc2.input_scale.shape == (4,)
    assert len(set(fc2.input_scale.tolist())) > 1
    # One step of the calibration's schedule falls into each part.
    sigmas = schedule("normal", 4)[:-1]
    assert [step_group(sigma, fc2.spec.step_sigmas) for sigma in sigmas] == [0, 1, 2, 3]


def test_progress_goes_from_nothing_to_all_in_every_phase(finished: tuple[Path, list[Progress]]) -> None:
    for phase in ("encode", "trajectories", "write"):
        reports = [report for report in finished[1] if report.phase == phase]
        assert [report.done for report in reports] == sorted(report.done for report in reports)
        assert reports[-1].done == reports[-1].total


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.8, 0.97])
def test_a_stopped_job_goes_on_to_the_same_bytes(
    tree: Path, finished: tuple[Path, list[Progress]], tmp_path: Path, share: float
) -> None:
    out, (whole, reports) = tmp_path / "best.safetensors", finished
    left = int(share * len(reports))

    def stop(_report: Progress) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Stopped

    with pytest.raises(Stopped):
        quantize_checkpoint("tiny", out, settings(tree), watch=stop)
    assert not out.exists()
    again = list[Progress]()
    summary = quantize_checkpoint("tiny", out, settings(tree), watch=again.append)
    assert summary.resumed
    assert len(again) < len(reports)
    assert out.read_bytes() == whole.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_a_killed_process_loses_nothing(tree: Path, finished: tuple[Path, list[Progress]], tmp_path: Path) -> None:
    """SIGKILL in the middle of writing; the work folder is what the next process has."""
    out = tmp_path / "best.safetensors"
    code = f"""
import os, signal, torch
from pathlib import Path
import octavo.checkpoint.resume
from octavo.compress.job import quantize_checkpoint
from tests.compress.small import settings
torch.set_num_threads(1)
octavo.checkpoint.resume.COMMIT_BYTES = 1  # every tensor, as those of a large model would be
def watch(report):
    if report.phase == "write" and report.done > 0.7 * report.total:
        os.kill(os.getpid(), signal.SIGKILL)
quantize_checkpoint("tiny", {str(out)!r}, settings(Path({str(tree)!r})), watch=watch)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    again = list[Progress]()
    assert quantize_checkpoint("tiny", out, settings(tree), watch=again.append).resumed
    assert next(report.done for report in again if report.phase == "write") > 0.5 * again[-1].total
    assert out.read_bytes() == finished[0].read_bytes()


def test_work_on_a_file_that_has_changed_is_begun_anew(tree: Path, tmp_path: Path) -> None:
    source, out = model(tmp_path / "models"), tmp_path / "row.safetensors"

    def stop(report: Progress) -> None:
        if report.done > report.total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        quantize_checkpoint(source, out, settings(tree, recipe="row"), watch=stop)
    tensors = load_file(source)
    name = f"{MMDIT}joint_blocks.0.x_block.mlp.fc1.weight"
    save_safetensors(source, {**tensors, name: 2 * tensors[name]})
    summary = quantize_checkpoint(source, out, settings(tree, recipe="row"))
    assert not summary.resumed
    result = load_file(out)
    weight = result[name].float() * result[f"{name}_scale"]
    assert torch.allclose(weight, 2 * tensors[name].float(), rtol=0.07, atol=1e-3)


def test_both_formats_come_from_one_calibration_and_are_the_same_alone(
    tree: Path, finished: tuple[Path, list[Progress]], tmp_path: Path
) -> None:
    out = tmp_path / "both.safetensors"
    ours, comfy = quantize_checkpoint("tiny", out, settings(tree, form="both")).files
    assert (ours.path, comfy.path) == (out, tmp_path / "both-comfy.safetensors")
    assert (ours.recipe.name, comfy.recipe.name) == ("best", "comfy")
    assert header(out)["octavo.calibration"] == header(comfy.path)["octavo.calibration"]
    assert "octavo.quantization" not in header(comfy.path)
    tensors = load_file(comfy.path)
    layer = f"{MMDIT}joint_blocks.0.x_block.mlp.fc2"
    assert tensors[f"{layer}.weight_scale"].shape == ()
    assert tensors[f"{layer}.input_scale"] > 0
    assert bytes(tensors[f"{layer}.comfy_quant"].tolist()) == b'{"format": "float8_e4m3fn"}'
    quantize_checkpoint("tiny", tmp_path / "comfy.safetensors", settings(tree, form="comfyui"))
    assert out.read_bytes() == finished[0].read_bytes()
    assert comfy.path.read_bytes() == (tmp_path / "comfy.safetensors").read_bytes()


def test_streaming_gives_the_same_as_keeping_the_model_in_memory(
    tree: Path, finished: tuple[Path, list[Progress]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.compress.stages.free_bytes", lambda _device: 0)
    out = tmp_path / "best.safetensors"
    quantize_checkpoint("tiny", out, settings(tree))
    assert out.read_bytes() == finished[0].read_bytes()


def test_waves_of_prompts_give_points_of_every_prompt(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for one prompt at a time: three waves, which are kept, and are as many points."""
    monkeypatch.setattr("octavo.compress.points.WAVE_BYTES", 1)
    out = tmp_path / "best.safetensors"
    quantize_checkpoint("tiny", out, settings(tree, work=tmp_path / "work"))
    waves = sorted((tmp_path / "work").glob("points-*.safetensors"))
    assert [len(load_file(wave)["sigmas"]) for wave in waves] == [2, 2, 2]  # two steps are two parts of the schedule
