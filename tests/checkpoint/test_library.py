"""The survey of a tree says what each file holds, and goes on past damaged ones."""

from pathlib import Path

import torch

from octavo.checkpoint.folders import Folders
from octavo.checkpoint.library import survey
from octavo.checkpoint.save import save_safetensors
from tests.checkpoint.samples import all_in_one, tiny, write_diffusers_folder


def test_each_file_is_told_by_what_is_inside(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "checkpoints" / "all.safetensors", all_in_one())
    save_safetensors(tmp_path / "vae" / "vae.safetensors", tiny("vae"))
    save_safetensors(tmp_path / "clip" / "clip_g.safetensors", tiny("clip_g"))
    write_diffusers_folder(tmp_path / "diffusers" / "sd35")
    lora = {"lora_unet_context_embedder.lora_down.weight": torch.zeros(4, 96)}
    save_safetensors(tmp_path / "elsewhere" / "style.safetensors", lora)
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "style.safetensors").symlink_to(tmp_path / "elsewhere" / "style.safetensors")
    (tmp_path / "vae" / "broken.safetensors").write_bytes(b"x")
    (tmp_path / "vae" / "old.ckpt").write_bytes(b"x" * 10)

    items = {item.file.name: item for item in survey(Folders.standard(tmp_path)) if not item.file.embedded}
    everything = ("mmdit", "clip_l", "clip_g", "t5", "vae")
    assert {name: item.kinds for name, item in items.items()} == {
        "all.safetensors": everything,
        "sd35": everything,
        "vae.safetensors": ("vae",),
        "clip_g.safetensors": ("clip_g",),
        "style.safetensors": ("lora",),
        "broken.safetensors": (),
        "old.ckpt": (),
    }
    assert "too short" in (items["broken.safetensors"].problem or "")
    assert "pickle" in (items["old.ckpt"].problem or "")
    assert items["old.ckpt"].nbytes == 10
    assert items["style.safetensors"].nbytes == (tmp_path / "elsewhere" / "style.safetensors").stat().st_size
    folder = tmp_path / "diffusers" / "sd35"
    assert items["sd35"].nbytes == sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_a_survey_may_be_of_some_categories_only(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "vae" / "vae.safetensors", tiny("vae"))
    items = survey(Folders.standard(tmp_path), "checkpoints", "diffusion_models")
    assert [item for item in items if not item.file.embedded] == []
