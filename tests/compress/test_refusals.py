"""What cannot be done is said before work begins where that is possible, and leaves nothing behind anyway."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from octavo.checkpoint.save import save_safetensors
from octavo.compress.job import quantize_checkpoint
from octavo.errors import (
    CheckpointError,
    CorruptFileError,
    GateError,
    ModelNotFoundError,
    OctavoError,
    RecipeError,
    RequestError,
    WrongModelError,
)
from tests.checkpoint.quantized import header, octavo_file
from tests.compress.small import model, settings

LAYER = "model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    model(root)
    return root


Refused = Callable[..., None]


@pytest.fixture
def refused(tree: Path, tmp_path: Path) -> Refused:
    """Asks for the job, expects the error, and that nothing is left where the file should have come."""

    def ask(kind: type[OctavoError], match: str, source: Path | str = "tiny", root: Path = tree, **given: Any) -> None:
        out = tmp_path / "out" / "fp8.safetensors"
        out.parent.mkdir()
        with pytest.raises(kind, match=match):
            quantize_checkpoint(source, out, settings(root, **given))
        assert list(out.parent.iterdir()) == []

    return ask


def test_a_model_in_fp8_already(refused: Refused, tmp_path: Path) -> None:
    tensors, fields, _ = octavo_file()
    save_safetensors(tmp_path / "fp8.safetensors", tensors, header(fields))
    refused(RequestError, "is FP8 already", tmp_path / "fp8.safetensors", recipe="row")


def test_a_lora(refused: Refused, tmp_path: Path) -> None:
    down = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 128)}
    save_safetensors(tmp_path / "lora.safetensors", down)
    refused(WrongModelError, "is a LoRA", tmp_path / "lora.safetensors")


def test_no_prompts(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n \n", "utf-8")
    refused(RequestError, "There is no prompt in", prompts=tmp_path / "none.txt")


def test_a_file_of_prompts_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    refused(RequestError, "Cannot read the prompts", prompts=tmp_path / "nowhere.txt")


@pytest.mark.parametrize("recipe", ["row", "best"])
def test_weights_that_are_not_numbers(refused: Refused, tree: Path, tmp_path: Path, recipe: str) -> None:
    tensors = load_file(tree / "checkpoints" / "tiny.safetensors")
    tensors[LAYER][3, 5] = torch.nan
    save_safetensors(tmp_path / "nan.safetensors", tensors)
    refused(CorruptFileError, "has NaN or infinity in", tmp_path / "nan.safetensors", recipe=recipe)


def test_no_space_on_the_disk(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(10**6, 10**6 - 1000, 1000))
    refused(CheckpointError, "its disk has 0.00 GB left", recipe="row")


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ("bset", "There is no recipe 'bset'"),
        ('[default]\ngranularty = "row"', "has the key 'granularty'"),
        ('[default]\nrounding = "up"', "rounding = 'up'; it is one of"),
    ],
)
def test_a_recipe_that_says_what_none_can(refused: Refused, tmp_path: Path, recipe: str, match: str) -> None:
    if "\n" in recipe:
        (tmp_path / "mine.toml").write_text(recipe, "utf-8")
        recipe = str(tmp_path / "mine.toml")
    refused(RecipeError, match, recipe=recipe)


def test_a_recipe_that_keeps_everything(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "none.toml").write_text("[default]\nkeep = true\n", "utf-8")
    refused(RequestError, "nothing to quantize", recipe=str(tmp_path / "none.toml"))


def test_comfyuis_form_for_a_recipe_by_row(refused: Refused) -> None:
    refused(RequestError, "which ComfyUI does not read", recipe="row", form="comfyui")


def test_calibration_without_text_encoders(refused: Refused, tree: Path, tmp_path: Path) -> None:
    alone = tmp_path / "models" / "checkpoints" / "alone.safetensors"
    save_safetensors(alone, load_file(tree / "checkpoints" / "tiny.safetensors"))
    refused(ModelNotFoundError, "no text encoders inside", "alone", root=tmp_path / "models")


def test_a_budget_below_the_smallest_file(refused: Refused) -> None:
    refused(RequestError, "A budget of 0.000 GB is too small", budget=1000)


def test_a_sensitivity_of_another_recipe(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text('{"errors": {"final_layer.linear": 1.0}, "weights": {"final_layer.linear": 4}}', "utf-8")
    refused(RequestError, "is about other layers", recipe="row", keep_16bit=0.1, sensitivity=path)


def test_sizes_beyond_the_model(refused: Refused) -> None:
    refused(RequestError, "sides are multiples of 16 up to 128", width=256, height=256)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"form": "gguf"}, "no file format 'gguf'"),
        ({"budget": 10, "keep_16bit": 0.1}, "give one of them"),
        ({"keep_16bit": 5}, "no share from 0 to 1"),
        ({"gate": 0, "min_psnr": 30.0}, "leave one of them out"),
        ({"calibration_size": 0}, "at least one prompt"),
        ({"finetune": -1}, "cannot be negative"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, given: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        settings(tmp_path, **given)


def test_the_source_is_never_replaced(tree: Path) -> None:
    source = tree / "checkpoints" / "tiny.safetensors"
    before = source.read_bytes()
    with pytest.raises(RequestError, match="is the model that is to be quantized"):
        quantize_checkpoint("tiny", source, settings(tree, recipe="row", force=True))
    assert source.read_bytes() == before


@pytest.mark.parametrize("taken", ["a.safetensors", "a-comfy.safetensors"])
def test_what_is_there_is_replaced_only_by_force(tree: Path, tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("something")
    with pytest.raises(RequestError, match="is there already"):
        quantize_checkpoint("tiny", tmp_path / "a.safetensors", settings(tree, form="both"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["something"]
    quantize_checkpoint("tiny", tmp_path / taken, settings(tree, recipe="row", force=True))
    assert load_file(tmp_path / taken)


def test_a_place_that_is_no_safetensors_file(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"write '.*fp8\.safetensors'"):
        quantize_checkpoint("tiny", tmp_path / "fp8.gguf", settings(tree, recipe="row"))


def test_a_work_folder_with_other_things_is_left_alone(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(RequestError, match="holds other things"):
        quantize_checkpoint("tiny", tmp_path / "a.safetensors", settings(tree, work=tmp_path / "photos"))
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "cat.jpg"]


def test_a_file_that_fails_its_gate(refused: Refused, tree: Path, tmp_path: Path) -> None:
    refused(GateError, r"asks for 99 dB; pictures of 'fp8\.safetensors' come to", recipe="cast", min_psnr=99.0, gate=1)
    forced = settings(tree, recipe="cast", min_psnr=99.0, gate=1, force=True)
    (written,) = quantize_checkpoint("tiny", tmp_path / "fp8.safetensors", forced).files
    assert written.path.exists()
    assert not written.verdict.passed
    assert "at least 99 asked for" in str(written.verdict)
