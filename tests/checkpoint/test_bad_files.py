"""Whatever is wrong with a file, the error names the file, what it found, and what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.checkpoint import load_clip, load_mmdit, load_t5, load_vae
from octavo.checkpoint.save import save_safetensors
from octavo.errors import (
    CheckpointError,
    CorruptFileError,
    ModelNotFoundError,
    UnsupportedFormatError,
    WrongModelError,
)
from tests.checkpoint.samples import tiny, write_shards
from tests.goldens import golden

QKV = "joint_blocks.0.x_block.attn.qkv.weight"


def header(fields: object, data: bytes = b"") -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + data


def one(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


TWO_AT_ONE_PLACE = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "xy"}
DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(b"", "is 0 bytes long", id="empty"),
        pytest.param(b"\x08\0\0", "is 3 bytes long", id="shorter than a length"),
        pytest.param((10**9).to_bytes(8, "little") + b"{}" * 50, "claims a header of 1000000000", id="absurd length"),
        pytest.param((10**6).to_bytes(8, "little") + b"{}", "its header alone should be 1000000", id="cut in header"),
        pytest.param(header(b"\xff\xfe{}"), "not JSON in UTF-8", id="not UTF-8"),
        pytest.param(header(b'{"x": '), "not JSON", id="not JSON"),
        pytest.param(header(DEEP), "not JSON", id="nested too deep"),
        pytest.param(header([]), "is a JSON list", id="a list"),
        pytest.param(header({"x": 3}), "describes 'x' by 3", id="entry is a number"),
        pytest.param(header({"x": {}}), "unknown dtype None", id="entry is empty"),
        pytest.param(header(one(dtype="F12"), bytes(4)), "unknown dtype 'F12'", id="unknown dtype"),
        pytest.param(header(one(shape=[-1]), bytes(4)), "impossible shape", id="negative side"),
        pytest.param(header(one(shape=[1.0]), bytes(4)), "impossible shape", id="side with a fraction"),
        pytest.param(header(one(shape=[True]), bytes(4)), "impossible shape", id="side is a truth value"),
        pytest.param(header(one(shape=[1] * 99), bytes(4)), "impossible shape", id="99 sides"),
        pytest.param(header(one(shape=[0, 2**62], offsets=[0, 0])), "impossible shape", id="empty but endless"),
        pytest.param(header(one(offsets=[4, 0]), bytes(4)), "impossible data_offsets", id="backwards"),
        pytest.param(header(one(offsets=[0]), bytes(4)), "impossible data_offsets", id="one offset"),
        pytest.param(header(one(offsets=[0, 4]), bytes(3)), "cut off", id="cut in data"),
        pytest.param(header(one(shape=[2]), bytes(4)), "takes 8", id="size lies"),
        pytest.param(header(TWO_AT_ONE_PLACE, bytes(4)), "overlapping", id="overlap"),
        pytest.param(header(one(offsets=[4, 8]), bytes(8)), "4 unclaimed bytes", id="hole"),
        pytest.param(header(one(), bytes(9)), "5 unclaimed bytes after 'x'", id="trailing bytes"),
        pytest.param(header(b'{"x": 1, "x": 2}'), "names 'x' twice", id="duplicate"),
        pytest.param(header({"__metadata__": {"a": 1}}), "does not map strings", id="metadata is no string"),
        pytest.param(header({"__metadata__": []}), "does not map strings", id="metadata is a list"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", id="LFS pointer"),
        pytest.param(b"<!DOCTYPE html><html>", "web page", id="web page"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=complaint) as error:
        load_mmdit(path)
    assert "'" + str(path) + "'" in str(error.value)
    assert "again" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.ckpt", b"anything"), ("a.bin", b""), ("a.safetensors", b"PK\x03\x04zip"), ("a.pt", b"\x80\x02}q\x00.")],
)
def test_pickles_are_refused_with_a_remedy(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedFormatError, match=r"pickle.*run code.*\.safetensors"):
        load_mmdit(tmp_path / name)


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UnsupportedFormatError, match="GGUF"):
        load_mmdit(tmp_path / "a.gguf")


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="There is no file"):
        load_mmdit(tmp_path / "a.safetensors")
    with pytest.raises(ModelNotFoundError, match="holds no weights"):
        load_mmdit(tmp_path)
    with pytest.raises(ModelNotFoundError, match="There is no file"):
        load_mmdit(tmp_path / "a.safetensors.index.json")


def test_a_folder_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedFormatError, match="only as pickles"):
        load_mmdit(tmp_path)


def written(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_safetensors(folder / "model_under_test.safetensors", tensors, metadata)
    return folder / "model_under_test.safetensors"


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path, tiny("mmdit")).read_bytes()
    for share in (0.001, 0.01, 0.3, 0.999):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CorruptFileError, match=r"cut off|too short"):
            load_mmdit(path)


def test_missing_tensors_are_counted_and_named(tmp_path: Path) -> None:
    tensors = tiny("mmdit")
    total = len(tensors)
    for i in (0, 1):
        del tensors[f"joint_blocks.{i}.x_block.mlp.fc1.weight"], tensors[f"joint_blocks.{i}.x_block.mlp.fc1.bias"]
    expected = rf"lacks 4 of the {total} tensors.*'joint_blocks.0.x_block.mlp.fc1.bias'.*and 1 more"
    with pytest.raises(CorruptFileError, match=expected):
        load_mmdit(written(tmp_path, tensors))


def test_surplus_tensors_are_named(tmp_path: Path) -> None:
    tensors = {**tiny("mmdit"), "guidance_in.weight": torch.zeros(2)}
    with pytest.raises(WrongModelError, match=r"1 tensors that it has no place for: 'guidance_in.weight'"):
        load_mmdit(written(tmp_path, tensors))


@pytest.mark.parametrize("key", ["x_embedder.proj.weight", "pos_embed", "context_embedder.weight", QKV])
def test_a_missing_tensor_that_tells_the_shape_is_named_too(tmp_path: Path, key: str) -> None:
    tensors = tiny("mmdit")
    del tensors[key]
    with pytest.raises(CorruptFileError, match=f"lacks.*'{key}'"):
        load_mmdit(written(tmp_path, tensors))


def test_a_missing_block_is_named(tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in tiny("mmdit").items() if not key.startswith("joint_blocks.0.")}
    with pytest.raises(CorruptFileError, match=r"lacks 'joint_blocks\.0'"):
        load_mmdit(written(tmp_path, tensors))


def test_a_shape_that_does_not_fit_is_shown_with_what_would(tmp_path: Path) -> None:
    tensors = {**tiny("mmdit"), QKV: torch.zeros(384, 64)}
    with pytest.raises(CorruptFileError, match=rf"'{QKV}' of shape \[384, 64\].*\[384, 128\]"):
        load_mmdit(written(tmp_path, tensors))


def change(tensors: dict[str, Tensor], key: str, value: float, dtype: torch.dtype) -> dict[str, Tensor]:
    changed = tensors[key].to(dtype, copy=True)
    changed.view(-1)[-1] = value
    return {**tensors, key: changed}


@pytest.mark.parametrize("key", [QKV, "pos_embed", "joint_blocks.1.x_block.mlp.fc2.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, key: str, value: float, dtype: torch.dtype) -> None:
    path = written(tmp_path, change(tiny("mmdit"), key, value, dtype))
    for wanted in (torch.float32, torch.float16):
        with pytest.raises(CorruptFileError, match=f"NaN or infinity in '{key}'"):
            load_mmdit(path, dtype=wanted)


def test_nan_codes_of_fp8_are_refused(tmp_path: Path) -> None:
    tensors = change(tiny("mmdit"), QKV, float("nan"), torch.float8_e4m3fn)
    with pytest.raises(CorruptFileError, match=f"NaN or infinity in '{QKV}'"):
        load_mmdit(written(tmp_path, tensors))


def test_values_beyond_float16_say_which_dtype_helps(tmp_path: Path) -> None:
    path = written(tmp_path, change(tiny("mmdit"), QKV, 1e5, torch.bfloat16))
    with pytest.raises(CheckpointError, match=f"'{QKV}' beyond float16.*bfloat16 or float32"):
        load_mmdit(path, dtype=torch.float16)
    load_mmdit(path, dtype=torch.bfloat16)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    from octavo.checkpoint.load import load_part
    from octavo.checkpoint.plan import plan_part
    from octavo.checkpoint.source import open_source

    path = written(tmp_path, tiny("mmdit"))
    with open_source(path) as source:
        plan = plan_part(source.require("mmdit"))
        with path.open("rb+") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(CorruptFileError, match="ended while"):
            load_part(plan, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("diffusers/lora_large_tiny_diffusers.safetensors", "is a LoRA.*models/loras"),
        ("diffusers/lora_large_tiny_kohya.safetensors", "is a LoRA.*models/loras"),
        ("comfyui/formats/lora_example.safetensors", "is a LoRA.*models/loras"),
        ("diffusers/controlnet_8b_tiny_original.safetensors", "is a ControlNet.*models/controlnet"),
        ("diffusers/controlnet_joint_tiny_diffusers.safetensors", "is a ControlNet.*models/controlnet"),
        ("comfyui/embeddings/twovec.safetensors", "textual-inversion.*models/embeddings"),
        ("diffusers/vae_tiny_single_file.safetensors", "holds VAE"),
        ("diffusers/t5_tiny.safetensors", "holds text encoder T5"),
        ("diffusers/vae_tiny_io.safetensors", "nothing that Octavo knows, but 4 other tensors"),
    ],
)
def test_another_kind_of_file_is_called_by_its_name(name: str, says: str) -> None:
    with pytest.raises(WrongModelError, match=f"{says}.*Give an SD3 or SD3.5 model"):
        load_mmdit(golden(name))


@pytest.mark.parametrize(
    ("load", "part"),
    [(load_clip, "text encoder CLIP-L or text encoder CLIP-G"), (load_t5, "text encoder T5"), (load_vae, "VAE")],
)
def test_a_part_that_is_not_inside_is_missed(tmp_path: Path, load: Callable[[Path], object], part: str) -> None:
    with pytest.raises(
        WrongModelError, match=f"holds diffusion model, but no {part}. Give a file that holds the {part}"
    ):
        load(written(tmp_path, tiny("mmdit")))


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion 1, 2 or XL"),
        ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "image encoder"),
    ],
)
def test_models_of_other_families_are_named(tmp_path: Path, key: str, what: str) -> None:
    with pytest.raises(WrongModelError, match=f"is an? .*{what}.*which Octavo does not run"):
        load_mmdit(written(tmp_path, {key: torch.zeros(2, 2)}))


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(WrongModelError, match="nothing that Octavo knows, but 0 other tensors"):
        load_mmdit(written(tmp_path, {}))


def test_a_vae_of_an_older_model_is_refused(tmp_path: Path) -> None:
    tensors = {**tiny("vae"), "quant_conv.weight": torch.zeros(8, 8, 1, 1), "quant_conv.bias": torch.zeros(8)}
    with pytest.raises(WrongModelError, match=r"'quant_conv.bias', 'quant_conv.weight'"):
        load_vae(written(tmp_path, tensors))


def fp8_mmdit() -> dict[str, Tensor]:
    tensors = tiny("mmdit")
    tensors[QKV] = tensors[QKV].to(torch.float8_e4m3fn)
    return tensors


def quant(description: object) -> Tensor:
    return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8)


LAYER = QKV.removesuffix(".weight")
E4M3 = {"format": "float8_e4m3fn"}


@pytest.mark.parametrize(
    ("extra", "error", "complaint"),
    [
        pytest.param(
            {f"{LAYER}.comfy_quant": quant(E4M3)}, CorruptFileError, f"'{QKV}' in FP8 without the scale", id="no scale"
        ),
        pytest.param(
            {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)},
            CorruptFileError,
            f"'{QKV}' in FP8 without the scale",
            id="marker but no scale",
        ),
        pytest.param(
            {"scaled_fp8": torch.zeros(1, dtype=torch.int32)}, UnsupportedFormatError, "dtype I32", id="odd marker"
        ),
        pytest.param(
            {f"{LAYER}.weight_scale": torch.tensor(float("nan"))}, CorruptFileError, "no finite number", id="NaN scale"
        ),
        pytest.param(
            {f"{LAYER}.weight_scale": torch.tensor(-1.0)}, CorruptFileError, "no finite number", id="negative scale"
        ),
        pytest.param(
            {f"{LAYER}.weight_scale": torch.ones(3, 4)}, UnsupportedFormatError, r"\[3, 4\]", id="scales by block"
        ),
        pytest.param(
            {f"{LAYER}.weight_scale": torch.ones(1, dtype=torch.int64)}, UnsupportedFormatError, "I64", id="whole scale"
        ),
        pytest.param(
            {f"{LAYER}.comfy_quant": quant({"format": "float8_e5m2"}), f"{LAYER}.weight_scale": torch.ones(())},
            CorruptFileError,
            "float8_e5m2 but keeps it as F8_E4M3",
            id="description lies",
        ),
        pytest.param(
            {f"{LAYER}.comfy_quant": quant([])}, CorruptFileError, "without a number", id="description is a list"
        ),
        pytest.param({f"{LAYER}.comfy_quant": quant({})}, CorruptFileError, "without a number format", id="no format"),
        pytest.param(
            {f"{LAYER}.comfy_quant": torch.zeros(3)},
            CorruptFileError,
            "not as bytes of JSON",
            id="description in floats",
        ),
        pytest.param(
            {f"{LAYER}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, CorruptFileError, "is not JSON", id="not JSON"
        ),
        *(
            pytest.param(
                {f"{LAYER}.comfy_quant": quant({"format": fmt})}, UnsupportedFormatError, f"'{LAYER}' as {fmt}", id=fmt
            )
            for fmt in ("nvfp4", "mxfp8", "int8_tensorwise")
        ),
        pytest.param(
            {"context_embedder.weight_scale": torch.ones(())},
            UnsupportedFormatError,
            "'context_embedder.weight' as F16 with a scale",
            id="scale of a 16-bit weight",
        ),
    ],
)
def test_fp8_without_a_known_rule_stops_with_the_layers_name(
    tmp_path: Path, extra: dict[str, Tensor], error: type[CheckpointError], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        load_mmdit(written(tmp_path, fp8_mmdit() | extra))


@pytest.mark.parametrize("metadata", ["no json", "[]", '{"layers": []}', json.dumps({"layers": {LAYER: 3}})])
def test_a_header_that_describes_layers_badly_is_refused(tmp_path: Path, metadata: str) -> None:
    with pytest.raises(CorruptFileError, match="Make the file again"):
        load_mmdit(written(tmp_path, fp8_mmdit(), {"_quantization_metadata": metadata}))


def test_one_layer_without_a_scale_among_others_with_theirs_is_refused(tmp_path: Path) -> None:
    """The peers' silent failure: the picture would be garbage."""
    from safetensors.torch import load_file

    tensors = load_file(golden("comfyui/formats/quant_metadata_header.safetensors"))
    lost = next(name for name in sorted(tensors) if name.endswith(".weight_scale"))
    del tensors[lost]
    with pytest.raises(CorruptFileError, match=f"'{lost.removesuffix('_scale')}' in FP8 without the scale"):
        load_mmdit(written(tmp_path, tensors))


def test_weights_in_whole_numbers_are_refused(tmp_path: Path) -> None:
    tensors = {**tiny("mmdit"), QKV: torch.zeros(384, 128, dtype=torch.int8)}
    with pytest.raises(UnsupportedFormatError, match=f"'{QKV}' as I8"):
        load_mmdit(written(tmp_path, tensors))


def test_number_formats_without_a_torch_dtype_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(header(one(dtype="F4", shape=[8], offsets=[0, 4]), bytes(4)))
    from octavo.checkpoint.tensors import open_tensors

    with open_tensors(path) as file, pytest.raises(UnsupportedFormatError, match="'x' as F4"):
        file.read("x")


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ("no json", "not an index"),
        ("[]", "not an index"),
        ("{}", "not an index"),
        ('{"weight_map": []}', "not an index"),
        ('{"weight_map": {}}', "names no shards"),
        ('{"weight_map": {"x": 3}}', "not an index"),
        ('{"weight_map": {"x": "../secret.safetensors"}}', "outside its own folder"),
        ('{"weight_map": {"x": "/etc/passwd"}}', "outside its own folder"),
        ('{"weight_map": {"x": ".."}}', "outside its own folder|not beside it"),
        ('{"weight_map": {"x": "gone.safetensors"}}', "'gone.safetensors', which is not beside it"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: str, complaint: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(CorruptFileError, match=complaint):
        load_mmdit(path)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path, "model", tiny("clip_l"), 2)
    fields = json.loads(index.read_text())
    fields["weight_map"]["phantom"] = next(iter(fields["weight_map"].values()))
    index.write_text(json.dumps(fields))
    with pytest.raises(CorruptFileError, match="promises 'phantom'"):
        load_clip(index)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path, "model", tiny("clip_l"), 2)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    save_safetensors(shard, tiny("clip_l"))
    with pytest.raises(CorruptFileError, match="in two shards"):
        load_clip(index)
