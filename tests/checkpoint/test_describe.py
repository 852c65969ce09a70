"""`octavo info` and `octavo models` say what is true of a file, for people and as JSON."""

import json
from pathlib import Path

import pytest
import torch

from octavo.checkpoint.describe import describe
from octavo.checkpoint.save import save_safetensors
from octavo.cli.info import human, info
from octavo.cli.models import models
from octavo.errors import CheckpointError, CorruptFileError, ModelNotFoundError, WrongModelError
from octavo.models import MMDiTConfig
from tests.checkpoint.samples import (
    MMDIT_PREFIX,
    all_in_one,
    recorded,
    shapes_of,
    tiny,
    write_diffusers_folder,
    write_hollow,
)
from tests.goldens import golden


@pytest.fixture(autouse=True)
def _away_from_other_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


def test_parts_bytes_and_what_is_left_over(tmp_path: Path) -> None:
    tensors = all_in_one()
    save_safetensors(tmp_path / "all.safetensors", tensors, {"modelspec.title": "Tiny"})
    description = describe(tmp_path / "all.safetensors")
    assert [part.kind for part in description.parts] == ["mmdit", "clip_l", "clip_g", "t5", "vae"]
    assert description.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    mmdit = description.parts[0]
    assert mmdit.nbytes == sum(tensor.nbytes for tensor in tiny("mmdit").values())
    assert mmdit.bytes_by_dtype == {"F16": mmdit.nbytes}
    assert mmdit.parameters == sum(tensor.numel() for tensor in tiny("mmdit").values())
    assert (description.other_tensors, description.other_bytes) == (1, 4)  # clip_l's logit_scale
    assert description.needs == ()
    assert description.metadata == {"modelspec.title": "Tiny"}


@pytest.mark.parametrize(
    ("name", "form", "fp8", "linears"),
    [
        ("reference_bf16", None, 0, 24),
        ("plain_e4m3fn_all", "e4m3fn, plain, no scales", 24, 24),
        ("plain_e5m2_all", "e5m2, plain, no scales", 24, 24),
        ("scaled_fp8_legacy", "e4m3fn, scaled, older form (scaled_fp8)", 17, 24),
        ("comfy_quant_layers", "e4m3fn and e5m2, scaled, described by layer (comfy_quant)", 16, 24),
        ("quant_metadata_header", "e4m3fn, scaled, described in the header", 17, 24),
    ],
)
def test_the_fp8_form_and_how_many_layers_have_it(name: str, form: str | None, fp8: int, linears: int) -> None:
    (part,) = describe(golden(f"comfyui/formats/{name}.safetensors")).parts
    assert (part.fp8_form, part.fp8_layers, part.linear_layers) == (form, fp8, linears)
    if name == "comfy_quant_layers":
        assert (part.fp8_input_scales, part.fp8_full_precision, part.fp8_rowwise) == (8, 1, 0)


def test_a_released_model_is_called_by_its_name_and_misses_its_encoders(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "m.safetensors", shapes_of("mmdit", MMDiTConfig.medium(), MMDIT_PREFIX))
    description = describe(path)
    assert description.what == "SD3.5 Medium"
    assert description.preset is not None
    assert description.preset.skip_layer_guidance is not None
    assert "text encoders" in description.needs[0]
    assert description.needs[1] == "a VAE"
    (part,) = description.parts
    assert part.parameters is not None
    assert 2.2e9 < part.parameters < 2.6e9
    assert part.what == "MMDiT, 24 blocks of width 1536, second attention in 13"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("diffusers/lora_large_tiny_kohya.safetensors", "LoRA, rank 4, 19 layers"),
        ("diffusers/lora_large_tiny_diffusers.safetensors", "LoRA, rank 4"),
        ("diffusers/controlnet_8b_tiny_original.safetensors", "ControlNet for canny"),
        ("diffusers/controlnet_joint_tiny_diffusers.safetensors", "ControlNet"),
        ("comfyui/embeddings/twovec.safetensors", "textual-inversion embedding"),
        ("diffusers/t5_tiny.safetensors", "text encoder T5, 3 layers of width 64"),
    ],
)
def test_other_files_are_described_too(name: str, what: str) -> None:
    description = describe(golden(name))
    assert description.what.startswith(what)
    assert description.preset is None
    assert description.needs == ()


def test_a_diffusers_folder_is_one_model(tmp_path: Path) -> None:
    description = describe(write_diffusers_folder(tmp_path / "sd35"))
    assert [(part.kind, part.style) for part in description.parts] == [
        ("mmdit", "diffusers"),
        ("clip_l", "single-file"),
        ("clip_g", "single-file"),
        ("t5", "single-file"),
        ("vae", "diffusers"),
    ]
    (mmdit, *_) = description.parts
    assert mmdit.parameters == sum(tensor.numel() for tensor in tiny("mmdit").values())


def test_what_could_not_be_loaded_is_refused_with_the_same_words(tmp_path: Path) -> None:
    tensors = tiny("mmdit")
    del tensors["joint_blocks.1.x_block.mlp.fc2.bias"]
    save_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CorruptFileError, match="lacks 1 of the"):
        info(str(tmp_path / "a.safetensors"))
    save_safetensors(tmp_path / "b.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(WrongModelError, match="nothing that Octavo knows"):
        info(str(tmp_path / "b.safetensors"))
    with pytest.raises(ModelNotFoundError):
        info("c")
    save_safetensors(tmp_path / "d.safetensors", tiny("mmdit"), {"octavo.settings": "[]"})
    with pytest.raises(CheckpointError, match="settings"):
        info(str(tmp_path / "d.safetensors"))


def test_info_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_safetensors(
        tmp_path / "models" / "checkpoints" / "tiny.safetensors",
        recorded("transformer_medium_tiny_fp8_scaled", MMDIT_PREFIX),
        {"octavo.domain": "Draws [nothing] yet."},
    )
    info("tiny")
    out = capsys.readouterr().out
    assert "MMDiT, 2 blocks of width 128" in out
    assert "20 of 26" in out
    assert "FP8 in the diffusion model: e4m3fn, scaled, older form (scaled_fp8)" in out
    assert "Draws [nothing] yet." in out
    assert "Needs beside it: text encoders (octavo pull text-encoders) and a VAE." in out
    assert "--size 384x384 --steps 28" in out


def test_info_as_json_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_safetensors(tmp_path / "all.safetensors", all_in_one())
    info(str(tmp_path / "all.safetensors"), as_json=True)
    fields = json.loads(capsys.readouterr().out)
    assert fields["parts"][0]["config"]["dual_attention"] == [0]
    assert fields["preset"]["steps"] == 28
    assert [part["kind"] for part in fields["parts"]] == ["mmdit", "clip_l", "clip_g", "t5", "vae"]


def test_models_for_people_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models()
    assert "octavo pull sd3.5-medium" in capsys.readouterr().out
    save_safetensors(tmp_path / "models" / "vae" / "[mine].safetensors", tiny("vae"))
    save_safetensors(tmp_path / "models" / "clip" / "clip_g.safetensors", tiny("clip_g"))
    (tmp_path / "models" / "vae" / "broken.safetensors").write_bytes(b"x")
    models()
    out = capsys.readouterr().out
    assert "[mine].safetensors" in out
    assert "text encoder CLIP-G" in out
    assert "too short" in out
    assert "octavo pull" not in out
    models(as_json=True)
    items = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert items["[mine].safetensors"]["kinds"] == ["vae"]
    assert items["broken.safetensors"]["problem"]


def test_bytes_are_written_as_on_the_hub() -> None:
    assert [human(n) for n in (0, 999, 1500, 16_460_379_262, 246_144_152)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "16 GB",
        "246 MB",
    ]
