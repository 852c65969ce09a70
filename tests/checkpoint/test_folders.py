"""A user's name for a file leads to it, wherever in the trees it lies; a wrong one leads to the right one's name."""

import os
from pathlib import Path

import pytest

from octavo.checkpoint.folders import EMBEDDED, MODELS, Folders
from octavo.errors import ModelNotFoundError, RequestError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def standard(working_dir: Path, **environment: str) -> Folders:
    return Folders.standard(environment=environment, working_dir=working_dir)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return touch(
        tmp_path / "models",
        "checkpoints/sd3.5_medium.safetensors",
        "checkpoints/mine/Sketch_v2.safetensors",
        "unet/sd3.5_large.safetensors",
        "diffusion_models/turbo.sft",
        "clip/clip_l.safetensors",
        "text_encoders/t5xxl_fp16.safetensors",
        "text_encoders/t5xxl_fp16.tokenizer.json",
        "vae/old.ckpt",
        "checkpoints/.cache/hidden.safetensors",
        "checkpoints/read me.txt",
        "diffusers/sd35/model_index.json",
        "diffusers/sd35/vae/diffusion_pytorch_model.safetensors",
    )


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("sd3.5_medium.safetensors", "checkpoints/sd3.5_medium.safetensors"),
        ("sd3.5_medium", "checkpoints/sd3.5_medium.safetensors"),
        ("SD3.5-Medium", "checkpoints/sd3.5_medium.safetensors"),
        ("mine/Sketch_v2.safetensors", "checkpoints/mine/Sketch_v2.safetensors"),
        ("mine\\sketch_v2", "checkpoints/mine/Sketch_v2.safetensors"),
        ("sketch v2", "checkpoints/mine/Sketch_v2.safetensors"),
        ("sd3.5-large", "unet/sd3.5_large.safetensors"),
        ("turbo", "diffusion_models/turbo.sft"),
        ("sd35", "diffusers/sd35"),
    ],
)
def test_a_model_is_found_by_every_way_of_naming_it(tree: Path, name: str, path: str) -> None:
    assert standard(tree.parent).find(name, *MODELS) == tree / path


def test_a_path_is_taken_as_it_is(tree: Path) -> None:
    file = touch(tree.parent, "elsewhere/a.safetensors") / "elsewhere/a.safetensors"
    assert standard(tree.parent).find(str(file), "vae") == file
    assert standard(tree.parent).find(str(tree / "diffusers/sd35")) == tree / "diffusers/sd35"
    assert standard(tree.parent).find(str(file.parent)) == file.parent


def test_both_names_of_a_folder_are_searched(tree: Path) -> None:
    names = {file.name for file in standard(tree.parent).files("text_encoders") if not file.embedded}
    assert names == {"clip_l.safetensors", "t5xxl_fp16.safetensors"}


def test_hidden_folders_and_other_files_are_left_out(tree: Path) -> None:
    names = [file.name for file in standard(tree.parent).files("checkpoints") if not file.embedded]
    assert names == ["sd3.5_medium.safetensors", "mine/Sketch_v2.safetensors"]


def test_pickles_are_found_so_that_they_can_be_refused_by_name(tree: Path) -> None:
    assert standard(tree.parent).find("old", "vae") == tree / "vae/old.ckpt"
    touch(tree, "vae/old.safetensors")
    assert standard(tree.parent).find("old", "vae") == tree / "vae/old.safetensors"


def test_a_near_miss_is_answered_with_the_name(tree: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model 'sd3\.5_medum'\. Did you mean 'sd3\.5_medium'\?"):
        standard(tree.parent).find("sd3.5_medum", *MODELS)


def test_without_any_model_the_error_says_what_to_download_and_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"octavo pull sd3\.5-medium") as error:
        standard(tmp_path).find("sd3.5_large", "checkpoints")
    assert str(tmp_path / "models" / "checkpoints") in str(error.value)
    assert "$OCTAVO_MODELS" in str(error.value)


def test_a_name_in_two_folders_must_be_given_in_full(tree: Path) -> None:
    touch(tree, "checkpoints/a/same.safetensors", "checkpoints/b/same.safetensors")
    folders = standard(tree.parent)
    with pytest.raises(ModelNotFoundError, match=r"'same' could be 'a/same\.safetensors', 'b/same\.safetensors'"):
        folders.find("same", "checkpoints")
    assert folders.find("b/same", "checkpoints") == tree / "checkpoints/b/same.safetensors"


def test_several_roots_are_searched_in_order(tmp_path: Path) -> None:
    first = touch(tmp_path / "first", "vae/a.safetensors")
    second = touch(tmp_path / "second", "vae/a.safetensors", "vae/b.safetensors")
    both = f"{first}{os.pathsep}{second}"
    for folders in (standard(tmp_path, OCTAVO_MODELS=both), Folders.standard(both)):
        assert folders.find("a", "vae") == first / "vae/a.safetensors"
        assert folders.find("b", "vae") == second / "vae/b.safetensors"
    assert Folders.standard(second, environment={"OCTAVO_MODELS": str(first)}).find("a", "vae").is_relative_to(second)


def test_the_embedded_tree_comes_last(tmp_path: Path) -> None:
    places = standard(tmp_path).places["text_encoders"]
    assert places[-2:] == (EMBEDDED / "text_encoders", EMBEDDED / "clip")
    assert not places[0].is_relative_to(EMBEDDED)


def test_loops_of_links_end(tree: Path) -> None:
    (tree / "checkpoints" / "mine" / "loop").symlink_to(tree / "checkpoints")
    assert len([file for file in standard(tree.parent).files("checkpoints") if not file.embedded]) == 2


EXTRA = """
# as in ComfyUI's example
comfyui:
  base_path: {base}
  checkpoints: models/checkpoints/
  text_encoders: |
    models/text_encoders/
    models/clip/
  upscale_models: models/upscale_models/
  custom_nodes: custom_nodes/
other:
  vae: shared vae
  unet: /absolute/unet
empty:
"""


def test_extra_model_paths_are_read_as_comfyui_reads_them(tmp_path: Path) -> None:
    (tmp_path / "extra_model_paths.yaml").write_text(EXTRA.format(base="ComfyUI/"))
    places = standard(tmp_path).places
    assert tmp_path / "ComfyUI/models/checkpoints" in places["checkpoints"]
    assert {tmp_path / "ComfyUI/models/text_encoders", tmp_path / "ComfyUI/models/clip"} < set(places["text_encoders"])
    assert tmp_path / "shared vae" in places["vae"]
    assert Path("/absolute/unet") in places["diffusion_models"]
    assert places["checkpoints"][0] == tmp_path / "models" / "checkpoints"


def test_a_default_section_comes_first(tmp_path: Path) -> None:
    text = EXTRA.format(base=tmp_path / "big disk") + "  is_default: true\nfirst:\n  is_default: true\n  vae: mine\n"
    (tmp_path / "extra_model_paths.yaml").write_text(text)
    places = standard(tmp_path).places
    assert places["vae"][0] == tmp_path / "mine"
    assert tmp_path / "big disk/models/checkpoints" in places["checkpoints"]


def test_the_file_beside_a_comfyui_models_folder_is_found(tmp_path: Path) -> None:
    comfyui = touch(tmp_path / "ComfyUI", "models/vae/x.safetensors")
    (comfyui / "extra_model_paths.yaml").write_text("a:\n  vae: extra\n")
    touch(comfyui, "extra/y.safetensors")
    folders = standard(tmp_path, OCTAVO_MODELS=str(comfyui / "models"))
    assert folders.find("y", "vae") == comfyui / "extra/y.safetensors"


def test_home_and_variables_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    (tmp_path / "extra_model_paths.yaml").write_text("a:\n  base_path: ~/ui\n  vae: v\n  loras: $DISK/l\n")
    places = standard(tmp_path).places
    assert tmp_path / "home/ui/v" in places["vae"]
    assert tmp_path / "disk/l" in places["loras"]


@pytest.mark.parametrize("text", ["a: [", "- a\n- b\n", "a: just a string\n", "\x00"])
def test_a_bad_extra_model_paths_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "extra_model_paths.yaml").write_text(text)
    with pytest.raises(RequestError, match=r"extra_model_paths\.yaml'.*Correct it"):
        standard(tmp_path)
