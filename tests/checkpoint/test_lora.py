"""LoRA files of every maker: the same change, whatever they call it; nothing is left out in silence."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.checkpoint.lora import read_lora
from octavo.checkpoint.save import save_safetensors
from octavo.errors import CorruptFileError, OctavoError, UnsupportedFormatError, WrongModelError
from octavo.fp8 import Fp8Linear, LinearSpec
from octavo.models import MMDiT
from octavo.models.adapter import Adapter, adapted, weight_of
from octavo.quantize import convert
from tests.goldens import golden
from tests.models.test_mmdit import diffusers_model

FC1 = "joint_blocks.1.x_block.mlp.fc1"  # [512, 128]
QKV = "joint_blocks.0.x_block.attn.qkv"  # [384, 128]
ABSENT = "diffusion_model.joint_blocks.9.x_block.mlp.fc1"
LAST = "joint_blocks.2.context_block.adaLN_modulation.1"  # [256, 128], its halves swapped in diffusers


@pytest.fixture(scope="module")
def model() -> MMDiT:
    return diffusers_model("large")


def adapter_of(model: MMDiT, path: Path) -> Adapter:
    return read_lora(path, {"mmdit": model})["mmdit"]


def written(tmp_path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_safetensors(tmp_path / "mine.safetensors", dict(tensors))
    return tmp_path / "mine.safetensors"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def output(model: MMDiT) -> Tensor:
    io = load_file(golden("diffusers/transformer_large_tiny_io.safetensors"))
    modulation = model.modulation(io["in.timestep"], io["in.pooled_projections"])
    velocity: Tensor = model(io["in.hidden_states"], io["in.encoder_hidden_states"], modulation)
    return velocity


@pytest.mark.parametrize(
    ("maker", "strength", "case"),
    [
        ("diffusers", 1.0, "diffusers_scale_1.0"),
        ("diffusers", 0.6, "diffusers_scale_0.6"),
        ("kohya", 1.0, "kohya_scale_1.0"),
    ],
)
def test_outputs_are_those_of_the_merged_model_in_diffusers(
    model: MMDiT, maker: str, strength: float, case: str
) -> None:
    adapter = adapter_of(model, golden(f"diffusers/lora_large_tiny_{maker}.safetensors"))
    expected = load_file(golden("diffusers/lora_large_tiny_io.safetensors"))[f"out.{case}"]
    before = output(model)
    with adapted(model, [(adapter, strength)]):
        assert (output(model) - expected).abs().max() < 2e-5
    assert torch.equal(output(model), before)
    assert (before - expected).abs().max() > 0.01  # so that it matters


def test_an_fp8_layer_keeps_its_codes_and_gives_the_exact_change(model: MMDiT) -> None:
    adapter = adapter_of(model, golden("diffusers/lora_large_tiny_kohya.safetensors"))
    fp8 = diffusers_model("large")
    names = [name for name in adapter.layers if "joint_blocks" in name]
    convert(fp8, dict.fromkeys(names, LinearSpec(granularity="row")))
    merged = diffusers_model("large")
    for name in names:
        layer = fp8.get_submodule(name)
        assert isinstance(layer, Fp8Linear)
        change = adapter.layers[name]
        merged.get_submodule(name).weight.copy_(change.merged(layer.dequantized(), 0.8))
    codes = {name: fp8.get_submodule(name).q.clone() for name in names}
    with adapted(fp8, [(adapter, 0.8)]):
        assert (output(fp8) - output(merged)).abs().max() < 2e-5
    for name, q in codes.items():
        assert torch.equal(fp8.get_submodule(name).q.view(torch.uint8), q.view(torch.uint8))


def test_a_change_that_comfyui_recorded_is_the_change_that_is_read() -> None:
    """Its weights were rounded by chance afterwards, by at most one step of e4m3fn, an eighth of the value."""
    results = load_file(golden("comfyui/formats/lora_results.safetensors"))
    tensors = load_file(golden("comfyui/formats/lora_example.safetensors"))
    name = "joint_blocks.1.x_block.mlp.fc1"
    up, down = (tensors[f"diffusion_model.{name}.lora_{half}.weight"] for half in ("up", "down"))
    model = diffusers_model("large")
    change = adapter_of(model, golden("comfyui/formats/lora_example.safetensors")).layers[name]
    assert torch.allclose(change.dense(), up @ down * (2 / 4), atol=1e-6)
    assert any(name in key for key in results)


SPELLINGS = {
    "comfyui": (f"diffusion_model.{FC1}", "lora_down.weight", "lora_up.weight"),
    "kohya": (f"lora_unet_{FC1.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
    "peft": ("transformer.transformer_blocks.1.ff.net.0.proj", "lora_A.weight", "lora_B.weight"),
    "peft with adapter": (
        "base_model.model.transformer_blocks.1.ff.net.0.proj",
        "lora_A.default.weight",
        "lora_B.default.weight",
    ),
    "older diffusers": ("transformer.transformer_blocks.1.ff.net.0.proj", "lora.down.weight", "lora.up.weight"),
    "onetrainer": ("lora_transformer_transformer_blocks_1_ff_net_0_proj", "lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("maker", SPELLINGS)
def test_one_change_under_every_makers_names(tmp_path: Path, model: MMDiT, maker: str) -> None:
    layer, down, up = SPELLINGS[maker]
    tensors = {f"{layer}.{down}": random(4, 128), f"{layer}.{up}": random(512, 4), f"{layer}.alpha": torch.tensor(2.0)}
    adapter = adapter_of(model, written(tmp_path, tensors))
    assert list(adapter.layers) == [FC1]
    assert torch.allclose(adapter.layers[FC1].dense(), random(512, 4) @ random(4, 128) / 2, atol=1e-5)


def test_queries_keys_and_values_land_in_their_rows(tmp_path: Path, model: MMDiT) -> None:
    tensors = {}
    for name in ("to_q", "to_v"):
        tensors[f"transformer.transformer_blocks.0.attn.{name}.lora_A.weight"] = random(2, 128, seed=len(tensors))
        tensors[f"transformer.transformer_blocks.0.attn.{name}.lora_B.weight"] = random(128, 2, seed=len(tensors))
    dense = adapter_of(model, written(tmp_path, tensors)).layers[QKV].dense()
    parts = list(tensors.values())
    assert torch.allclose(dense[:128], parts[1] @ parts[0], atol=1e-5)
    assert not dense[128:256].any()
    assert torch.allclose(dense[256:], parts[3] @ parts[2], atol=1e-5)


def test_halves_that_diffusers_swaps_are_swapped_back(tmp_path: Path, model: MMDiT) -> None:
    layer = "transformer.transformer_blocks.2.norm1_context.linear"
    tensors = {f"{layer}.lora_A.weight": random(2, 128), f"{layer}.lora_B.weight": random(256, 2)}
    dense = adapter_of(model, written(tmp_path, tensors)).layers[LAST].dense()
    theirs = random(256, 2) @ random(2, 128)
    assert torch.allclose(dense, torch.cat([theirs[128:], theirs[:128]]), atol=1e-5)


def loha(layer: str, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    tensors = {
        f"{layer}.hada_w1_a": random(512, rank, seed=1), f"{layer}.hada_w1_b": random(rank, 128, seed=2),
        f"{layer}.hada_w2_a": random(512, rank, seed=3), f"{layer}.hada_w2_b": random(rank, 128, seed=4),
        f"{layer}.alpha": torch.tensor(1.0),
    }  # fmt: skip
    a, b, c, d, _ = tensors.values()
    return tensors, (a @ b) * (c @ d) / rank


@pytest.mark.parametrize("rank", [3, 40])
def test_the_product_of_loha_is_exact_as_low_rank_or_dense(tmp_path: Path, model: MMDiT, rank: int) -> None:
    tensors, expected = loha(f"lycoris_{FC1.replace('.', '_')}", rank)
    change = adapter_of(model, written(tmp_path, tensors)).layers[FC1]
    assert torch.allclose(change.dense(), expected, rtol=1e-4, atol=1e-4)
    x = random(5, 128, seed=9)
    assert torch.allclose(change.deltas[0](x), x @ expected.t(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("split", [False, True])
def test_lokr_is_a_kronecker_product(tmp_path: Path, model: MMDiT, split: bool) -> None:
    layer = f"lora_unet_{FC1.replace('.', '_')}"
    left, down, up = random(8, 4), random(2, 32), random(64, 2)
    right = {"lokr_w2_a": up, "lokr_w2_b": down} if split else {"lokr_w2": up @ down}
    tensors = {f"{layer}.lokr_w1": left, f"{layer}.alpha": torch.tensor(1.0)}
    tensors |= {f"{layer}.{name}": tensor for name, tensor in right.items()}
    change = adapter_of(model, written(tmp_path, tensors)).layers[FC1]
    expected = torch.kron(left, up @ down) * (0.5 if split else 1.0)
    assert torch.allclose(change.dense(), expected, atol=1e-4)
    x = random(5, 128)
    assert torch.allclose(change.deltas[0](x), x @ expected.t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_dora_gives_each_row_its_length(tmp_path: Path, model: MMDiT, strength: float) -> None:
    lengths = random(512, 1).abs() + 0.5
    layer = "transformer.transformer_blocks.1.ff.net.0.proj"
    tensors = {f"{layer}.lora_A.weight": random(4, 128) / 30, f"{layer}.lora_B.weight": random(512, 4) / 30}
    tensors[f"{layer}.dora_scale"] = lengths
    adapter = adapter_of(model, written(tmp_path, tensors))
    linear = model.get_submodule(FC1)
    weight = weight_of(linear)
    changed = weight + random(512, 4) @ random(4, 128) / 900
    target = changed / changed.norm(dim=1, keepdim=True) * lengths
    expected = weight + strength * (target - weight)
    x = random(3, 128)
    with adapted(model, [(adapter, strength)]):
        assert torch.allclose(linear(x), torch.nn.functional.linear(x, expected, linear.bias), rtol=1e-4, atol=1e-4)
    assert torch.allclose(adapter.layers[FC1].merged(weight, strength), expected, atol=1e-5)


def test_several_adapters_add_up_and_none_is_none(model: MMDiT) -> None:
    one = adapter_of(model, golden("diffusers/lora_large_tiny_diffusers.safetensors"))
    other = adapter_of(model, golden("diffusers/lora_large_tiny_kohya.safetensors"))
    linear, x = model.get_submodule(QKV), random(3, 128)
    plain = linear(x)
    with adapted(model, [(one, 0.5), (other, -1.5), (one, 0.0)]):
        both = linear(x)
    expected = plain + x @ (0.5 * one.layers[QKV].dense() - 1.5 * other.layers[QKV].dense()).t()
    assert torch.allclose(both, expected, rtol=1e-4, atol=1e-4)


def pair(layer: str = f"diffusion_model.{FC1}", rows: int = 512, columns: int = 128) -> dict[str, Tensor]:
    return {f"{layer}.lora_down.weight": random(4, columns), f"{layer}.lora_up.weight": random(rows, 4)}


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (pair() | pair(ABSENT) | pair(f"diffusion_model.{QKV}", 384), WrongModelError, f"does not have: '{ABSENT}'"),
        (pair() | pair(f"diffusion_model.{QKV}", 384) | {"odd": random(2)}, WrongModelError, "does not have: 'odd'"),
        (pair("lora_unet_input_blocks_1_1_proj_in"), WrongModelError, "is a LoRA for a U-Net"),
        (pair("transformer.single_transformer_blocks.0.proj_out"), WrongModelError, "is a LoRA for a FLUX model"),
        (pair(columns=64), WrongModelError, r"shape \[512, 64\], which is \[512, 128\]"),
        ({"a.weight": random(2, 2)}, WrongModelError, "none of its 1 tensors"),
        ({f"diffusion_model.{FC1}.lora_down.weight": random(4, 128)}, CorruptFileError, "a part is missing"),
        (pair() | {f"diffusion_model.{FC1}.lora_up.weight": random(512, 3)}, CorruptFileError, "ranks that differ"),
        (pair() | {f"diffusion_model.{FC1}.lora_up.weight": torch.full((512, 4), torch.nan)}, CorruptFileError, "NaN"),
        (pair() | {f"diffusion_model.{FC1}.lora_down.weight": random(4, 128, 3, 3)}, UnsupportedFormatError, "convolu"),
        (pair() | {f"diffusion_model.{FC1}.dora_scale": random(1, 128)}, UnsupportedFormatError, "only DoRA by rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(
    tmp_path: Path, model: MMDiT, tensors: dict[str, Tensor], error: type[OctavoError], message: str
) -> None:
    with pytest.raises(error, match=message) as refused:
        adapter_of(model, written(tmp_path, tensors))
    assert "mine.safetensors" in str(refused.value)


def test_text_encoders_that_are_not_there_are_told_and_left_out(
    tmp_path: Path, model: MMDiT, caplog: pytest.LogCaptureFixture
) -> None:
    layer = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    adapters = read_lora(written(tmp_path, pair() | pair(layer, 64, 64)), {"mmdit": model})
    assert set(adapters) == {"mmdit"}
    assert "changes text encoders that are not there" in caplog.text
