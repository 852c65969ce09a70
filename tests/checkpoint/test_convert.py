"""Conversion: the weights stay what they are to the last bit, there and back, 16-bit and FP8."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from octavo.checkpoint import load_clip, load_mmdit, load_t5, load_vae
from octavo.checkpoint.convert import plan_conversion
from octavo.checkpoint.plan import plan_part
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.source import open_source
from octavo.errors import CheckpointError, UnsupportedFormatError
from octavo.fp8 import Fp8Linear, Scaled, dequantize
from octavo.models import MMDiTConfig
from octavo.text import word_level_tokenizer
from tests.checkpoint.converting import convert, write_single
from tests.checkpoint.quantized import header, octavo_file
from tests.checkpoint.samples import (
    ENCODERS,
    MMDIT_PREFIX,
    all_in_one,
    mmdit_in_diffusers,
    recorded,
    shapes_of,
    tiny,
    vae_in_diffusers,
    write_diffusers_folder,
    write_hollow,
    write_shards,
)
from tests.checkpoint.test_layouts import in_fp8
from tests.goldens import golden


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Of a file, or of a component's shards."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        as_bytes = (each.contiguous().view(-1).view(torch.uint8) for each in (found[name], tensor))
        assert torch.equal(*as_bytes), name


def assert_same_model(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name].float(), b[name].float()) for name in a)


def parts(path: Path) -> list[nn.Module]:
    return [load_mmdit(path), load_clip(path, "clip_l"), load_clip(path, "clip_g"), load_t5(path), load_vae(path)]


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_single(tmp_path / "single.safetensors")


def test_a_single_file_becomes_the_folder_that_diffusers_has(tmp_path: Path, single: Path) -> None:
    """Names and cuts are those of golden/diffusers' conversion notes."""
    convert(single, tmp_path / "folder")
    assert_same(tensors_of(tmp_path / "folder" / "transformer"), mmdit_in_diffusers(tiny("mmdit")))
    assert_same(tensors_of(tmp_path / "folder" / "vae"), vae_in_diffusers(tiny("vae")))


def test_a_single_file_comes_back_from_a_folder_as_it_was(tmp_path: Path, single: Path) -> None:
    convert(single, tmp_path / "folder", shard_bytes=200_000)
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert_same(tensors_of(tmp_path / "back.safetensors"), tensors_of(single))
    assert metadata_of(tmp_path / "back.safetensors")["modelspec.title"] == "Tiny"


@pytest.mark.parametrize("name", ["transformer_large_tiny", "transformer_medium_tiny"])
def test_the_recorded_models_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    source = golden(f"diffusers/{name}.safetensors")
    convert(source, tmp_path / "folder")
    assert_same(tensors_of(tmp_path / "folder" / "transformer"), mmdit_in_diffusers(recorded(name, MMDIT_PREFIX)))
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert_same(tensors_of(tmp_path / "back.safetensors"), load_file(source))


def test_a_folder_comes_back_from_a_single_file_as_it_was(tmp_path: Path) -> None:
    """Projections of CLIP-L included, which the model has no use for; and what only config.json tells."""
    folder = write_diffusers_folder(tmp_path / "folder")
    convert(folder, tmp_path / "all.safetensors")
    convert(tmp_path / "all.safetensors", tmp_path / "back")
    for component in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        assert_same(tensors_of(tmp_path / "back" / component), tensors_of(folder / component))
    for path in (tmp_path / "all.safetensors", tmp_path / "back"):
        for one, other in zip(parts(path), parts(folder), strict=True):
            assert one.config == other.config
            assert_same_model(one, other)


def test_an_all_in_one_file_becomes_a_folder(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "all.safetensors", all_in_one())
    conversion = convert(tmp_path / "all.safetensors", tmp_path / "folder")
    assert conversion.kinds == ("mmdit", "clip_l", "clip_g", "t5", "vae")
    for one, other in zip(parts(tmp_path / "folder"), parts(tmp_path / "all.safetensors"), strict=True):
        assert_same_model(one, other)
    assert any("logit_scale" in note for note in conversion.notes)
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
        "model_index.json", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae",
    }  # fmt: skip


def test_a_prefix_is_taken_off_and_put_on(tmp_path: Path, single: Path) -> None:
    convert(single, tmp_path / "bare.safetensors", parts=("mmdit",), bare=True)
    assert_same(tensors_of(tmp_path / "bare.safetensors"), tiny("mmdit"))
    convert(tmp_path / "bare.safetensors", tmp_path / "back.safetensors")
    assert_same(
        tensors_of(tmp_path / "back.safetensors"),
        {MMDIT_PREFIX + name: tensor for name, tensor in tiny("mmdit").items()},
    )


@pytest.mark.parametrize("kind", ["clip_l", "clip_g", "t5", "vae"])
def test_one_part_is_taken_out_under_its_bare_names(tmp_path: Path, kind: str) -> None:
    """Small encoders say which they are, since their widths do not."""
    folder = write_diffusers_folder(tmp_path / "folder")
    convert(folder, tmp_path / "part.safetensors", parts=(kind,))
    assert_same(tensors_of(tmp_path / "part.safetensors"), tiny(kind))  # type: ignore[arg-type]
    with open_source(tmp_path / "part.safetensors") as part, open_source(folder) as whole:
        assert part.parts[0].part.kind == kind
        assert plan_part(part.parts[0]).config == plan_part(whole.require(kind)).config  # type: ignore[arg-type]


FP8_NAMES = ("scaled_fp8_legacy", "comfy_quant_layers", "quant_metadata_header", "plain_e4m3fn_all", "plain_e5m2_all")


@pytest.mark.parametrize("name", FP8_NAMES)
def test_fp8_goes_to_diffusers_and_back_without_loss(tmp_path: Path, name: str) -> None:
    """Every recorded form: the layers that are loaded are the same, codes, scales and all."""
    source = golden(f"comfyui/formats/{name}.safetensors")
    convert(source, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    expected = load_mmdit(source)
    for path in (tmp_path / "folder", tmp_path / "back.safetensors"):
        model = load_mmdit(path)
        assert_same_model(model, expected)
        for layer_name, layer in expected.named_modules():
            if isinstance(layer, Fp8Linear):
                found = model.get_submodule(layer_name)
                assert isinstance(found, Fp8Linear)
                assert found.spec == layer.spec


def test_files_in_comfyuis_form_come_back_byte_for_byte(tmp_path: Path) -> None:
    source = golden("comfyui/formats/comfy_quant_layers.safetensors")
    convert(source, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert_same(tensors_of(tmp_path / "back.safetensors"), load_file(source))


def test_the_scaled_medium_of_diffusers_gives_its_recorded_output_from_a_folder(tmp_path: Path) -> None:
    convert(golden("diffusers/transformer_medium_tiny_fp8_scaled.safetensors"), tmp_path / "folder")
    model = load_mmdit(tmp_path / "folder")
    inputs = load_file(golden("diffusers/transformer_medium_tiny_io.safetensors"))
    expected = load_file(golden("diffusers/transformer_medium_tiny_fp8_scaled_io.safetensors"))["out.sample"]
    modulation = model.modulation(inputs["in.timestep"], inputs["in.pooled_projections"])
    out = model(inputs["in.hidden_states"], inputs["in.encoder_hidden_states"], modulation)
    assert (out - expected).abs().max() < 2e-5
    assert isinstance(model.context_embedder, Fp8Linear)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("rank", [0, 2])
def test_our_own_form_comes_back_as_it_was(tmp_path: Path, granularity: str, rank: int) -> None:
    """Branches of split matrices share their `down`, so joined they are what they were."""
    tensors, form, _ = octavo_file(granularity=granularity, rank=rank, input_scale=0.5, full_precision=True)
    save_safetensors(tmp_path / "q.safetensors", tensors, header(form, **{"octavo.recipe": 'name = "best"'}))
    convert(tmp_path / "q.safetensors", tmp_path / "folder", shard_bytes=150_000)
    convert(tmp_path / "folder", tmp_path / "back.safetensors", form="octavo" if not rank else None)
    if granularity == "row" or rank:
        assert_same(tensors_of(tmp_path / "back.safetensors"), tensors)
        written = metadata_of(tmp_path / "back.safetensors")
        assert json.loads(written["octavo.quantization"]) == form
        assert written["octavo.recipe"] == 'name = "best"'
    expected = load_mmdit(tmp_path / "q.safetensors")
    for path in (tmp_path / "folder", tmp_path / "back.safetensors"):
        assert_same_model(load_mmdit(path), expected)


@pytest.mark.parametrize(("block", "comes_back"), [((64, 32), True), ((96, 32), False)])
def test_scales_by_block_come_back(tmp_path: Path, block: tuple[int, int], comes_back: bool) -> None:
    """As they were where cuts run between blocks, as blocks one row high elsewhere; the weights are the same."""
    tensors, form, values = octavo_file(granularity="block", block=block)
    save_safetensors(tmp_path / "q.safetensors", tensors, header(form))
    convert(tmp_path / "q.safetensors", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    if comes_back:
        assert_same(tensors_of(tmp_path / "back.safetensors"), tensors)
    for path in (tmp_path / "folder", tmp_path / "back.safetensors"):
        for name, module in load_mmdit(path).named_modules():
            if isinstance(module, Fp8Linear):
                weight = dequantize(Scaled(module.q, module.scale, module.spec.block))
                assert torch.equal(weight, values[f"{name}.weight"])


def test_scales_that_differ_between_pieces_become_scales_by_row_and_come_back(tmp_path: Path) -> None:
    """q has another scale than k and v; the single file has one scale a row, the folder one a piece again."""
    tensors = in_fp8(mmdit_in_diffusers(tiny("mmdit")), lambda name: 0.125 if "to_q" in name else 0.25)
    save_safetensors(tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors", tensors)
    conversion = convert(tmp_path / "folder", tmp_path / "single.safetensors")
    scale = tensors_of(tmp_path / "single.safetensors")[f"{MMDIT_PREFIX}joint_blocks.0.x_block.attn.qkv.weight_scale"]
    assert scale.flatten().tolist() == [0.125] * 128 + [0.25] * 256
    assert any("ComfyUI does not" in note for note in conversion.notes)
    convert(tmp_path / "single.safetensors", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back" / "transformer"), tensors)


def test_pieces_in_different_dtypes_are_not_joined_with_loss(tmp_path: Path) -> None:
    tensors = mmdit_in_diffusers(tiny("mmdit"))
    name = "transformer_blocks.0.attn.to_k.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_safetensors(tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(UnsupportedFormatError, match=r"attn.qkv.weight', in different dtypes: .*Quantize all of them"):
        convert(tmp_path / "folder", tmp_path / "single.safetensors")
    tensors[name] = tensors[name].to(torch.bfloat16)
    save_safetensors(tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(UnsupportedFormatError, match="--dtype"):
        convert(tmp_path / "folder", tmp_path / "single.safetensors")
    convert(tmp_path / "folder", tmp_path / "single.safetensors", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "single.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_changes_everything_but_fp8_and_its_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors, form, _ = octavo_file(rank=2)
    save_safetensors(tmp_path / "q.safetensors", tensors, header(form))
    convert(tmp_path / "q.safetensors", tmp_path / "other.safetensors", dtype=dtype)
    for name, tensor in tensors_of(tmp_path / "other.safetensors").items():
        if tensors[name].dtype == torch.float16:
            assert torch.equal(tensor, tensors[name].to(dtype))
        else:
            assert tensor.dtype == tensors[name].dtype


def test_a_value_beyond_float16_stops_the_conversion(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in tiny("mmdit").items()}
    tensors["context_embedder.bias"][3] = 70_000
    save_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"'context_embedder.bias' beyond the 65504 of float16. Choose bfloat16"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype=torch.float16)
    assert not (tmp_path / "b.safetensors").exists()


def test_a_projection_that_diffusers_wants_is_the_identity_where_there_is_none(tmp_path: Path) -> None:
    """SD3 takes the pooled output as it is; diffusers always projects it."""
    tensors = {name: tensor for name, tensor in tiny("clip_l").items() if name != "text_projection.weight"}
    save_safetensors(tmp_path / "clip_l.safetensors", tensors)
    convert(tmp_path / "clip_l.safetensors", tmp_path / "folder")
    written = tensors_of(tmp_path / "folder" / "text_encoder")
    assert torch.equal(written.pop("text_projection.weight"), torch.eye(64).half())
    assert_same(written, tensors)


def test_a_projection_kept_as_a_bare_parameter_is_turned(tmp_path: Path) -> None:
    for kind in ("clip_l", "clip_g"):
        tensors = tiny(kind)
        tensors["text_projection"] = tensors.pop("text_projection.weight").t().contiguous()
        save_safetensors(tmp_path / f"{kind}.safetensors", tensors)
        convert(tmp_path / f"{kind}.safetensors", tmp_path / kind)
        folder = tmp_path / kind / ("text_encoder" if kind == "clip_l" else "text_encoder_2")
        assert_same(tensors_of(folder), tiny(kind))


def test_shards_are_no_larger_than_asked_and_hold_everything_once(tmp_path: Path, single: Path) -> None:
    convert(single, tmp_path / "folder", parts=("mmdit",), shard_bytes=300_000)
    folder = tmp_path / "folder" / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert all(f"-of-{len(shards):05}." in shard.name for shard in shards)
    for shard in shards:
        held = load_file(shard)
        assert sum(tensor.nbytes for tensor in held.values()) <= 300_000 or len(held) == 1
        assert all(index["weight_map"][name] == shard.name for name in held)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tiny("mmdit").values())
    assert index["weight_map"].keys() == mmdit_in_diffusers(tiny("mmdit")).keys()


def test_a_sharded_single_file_layout_becomes_one_file(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "shards", "model", tiny("mmdit"), 3)
    convert(index, tmp_path / "one.safetensors", bare=True)
    assert_same(tensors_of(tmp_path / "one.safetensors"), tiny("mmdit"))


def test_a_model_keeps_its_settings_when_its_name_is_lost(tmp_path: Path) -> None:
    """A Turbo is known by its name alone."""

    path = write_hollow(
        tmp_path / "sd3.5_large_turbo.safetensors", shapes_of("mmdit", MMDiTConfig.large(), MMDIT_PREFIX)
    )
    with open_source(path) as source:
        for to, carried in (("mine.safetensors", True), ("my-turbo.safetensors", False), ("mine", True)):
            conversion = plan_conversion(source, tmp_path / to)
            metadata = conversion.files[0].metadata
            assert ("octavo.settings" in metadata) == carried
            if carried:
                assert json.loads(metadata["octavo.settings"])["steps"] == 4


def test_progress_adds_up_to_all_bytes(tmp_path: Path, single: Path) -> None:
    told: list[int] = []
    with open_source(single) as source:
        conversion = plan_conversion(source, tmp_path / "folder")
        conversion.run(told.append)
    assert sum(told) == conversion.nbytes == sum(tensor.nbytes for tensor in load_file(single).values())


@pytest.mark.parametrize("kind", ENCODERS.values())
def test_encoders_say_which_tokenizer_goes_with_them(tmp_path: Path, kind: str) -> None:
    """A vocabulary of its own comes along: from beside the file into the folder, and back."""
    source = tmp_path / "source.safetensors"
    save_safetensors(source, tiny(kind), {"octavo.config": json.dumps({"kind": kind})})  # type: ignore[arg-type]
    tokenizer = word_level_tokenizer(("a", "red"), start=None if kind == "t5" else "<start>")
    tokenizer.save(str(tmp_path / "source.tokenizer.json"))
    convert(source, tmp_path / "folder")
    number = {"clip_l": "", "clip_g": "_2", "t5": "_3"}[kind]
    expected = (tmp_path / "source.tokenizer.json").read_bytes()
    assert (tmp_path / "folder" / f"tokenizer{number}" / "tokenizer.json").read_bytes() == expected
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert (tmp_path / "back.tokenizer.json").read_bytes() == expected
