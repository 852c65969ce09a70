"""Every FP8 form of ComfyUI's files: weights dequantized exactly, and the network's output as recorded from ComfyUI."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.checkpoint import load_mmdit
from octavo.checkpoint.save import save_safetensors
from octavo.fp8 import Fp8Linear
from octavo.models import MMDiT
from tests.goldens import golden

PREFIX = "model.diffusion_model."
# File, and how many of its 26 linear layers stay FP8.
FILES = {
    "reference_bf16": 0,
    "plain_e4m3fn_all": 24,
    "plain_e5m2_all": 24,
    "scaled_fp8_legacy": 17,
    "comfy_quant_layers": 16,
    "quant_metadata_header": 17,
    "unet_quant_metadata_header": 17,
}
SCALES = (".scale_weight", ".weight_scale")
NOT_WEIGHTS = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


def formats(name: str) -> Path:
    return golden(f"comfyui/formats/{name}.safetensors")


def by_the_rule(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rule that formats.json states: W = weight · scale in float32, or the weight where there is no scale."""
    values = {}
    for name, tensor in tensors.items():
        if not name.endswith(NOT_WEIGHTS):
            layer = name.removesuffix(".weight")
            scale = next((tensors[layer + ending] for ending in SCALES if layer + ending in tensors), torch.ones(()))
            values[name.removeprefix(PREFIX)] = tensor.float() * scale
    return values


def values_of(model: MMDiT) -> dict[str, torch.Tensor]:
    """All weights in float32 by their single-file names, FP8 ones dequantized."""
    values = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            values[f"{name}.weight"] = values.pop(f"{name}.q").float() * values.pop(f"{name}.scale")
            values.pop(f"{name}.input_scale", None)
    return values


def fp8_layers(model: MMDiT) -> Iterator[Fp8Linear]:
    return (module for module in model.modules() if isinstance(module, Fp8Linear))


def output(model: MMDiT) -> torch.Tensor:
    inputs = load_file(formats("inputs"))
    return model(inputs["x"], inputs["context"], model.modulation(inputs["timestep"], inputs["y"]))


@pytest.mark.parametrize("name", FILES)
def test_weights_are_dequantized_exactly(name: str) -> None:
    values = values_of(load_mmdit(formats(name)))
    expected = by_the_rule(load_file(formats(name)))
    assert values.keys() == expected.keys()
    for key in expected:
        assert torch.equal(values[key], expected[key]), key


@pytest.mark.parametrize("name", FILES)
def test_the_network_gives_what_comfyui_gives_with_dequantized_weights(name: str) -> None:
    expected = load_file(formats("expected"))[f"weights_dequantised/{name}"]
    assert (output(load_mmdit(formats(name))) - expected).abs().max() < 2e-5


@pytest.mark.parametrize(("name", "count"), FILES.items())
def test_linear_layers_stay_fp8_in_memory(name: str, count: int) -> None:
    layers = list(fp8_layers(load_mmdit(formats(name), dtype=torch.bfloat16)))
    assert len(layers) == count
    assert all(layer.q.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) for layer in layers)
    assert all(layer.scale.dtype == torch.float32 for layer in layers)


@pytest.mark.parametrize("name", FILES)
def test_everything_else_takes_the_compute_dtype(name: str) -> None:
    model = load_mmdit(formats(name), dtype=torch.bfloat16)
    others = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith((".q", "scale"))}
    assert {tensor.dtype for tensor in others.values()} == {torch.bfloat16}
    assert "pos_embed" in others
    assert "joint_blocks.0.x_block.attn.qkv.bias" in others


def test_details_of_the_layers_are_kept() -> None:
    """As formats.json says: layer 1 is e5m2, layer 3 asks for full precision, even ones carry an input scale."""
    model = load_mmdit(formats("comfy_quant_layers"))
    order = json.loads(golden("comfyui/formats/formats.json").read_text())["quantised_layers_in_index_order"]
    for index, name in enumerate(order):
        layer = model.get_submodule(name)
        if index == 2:
            assert isinstance(layer, torch.nn.Linear)
            continue
        assert isinstance(layer, Fp8Linear)
        assert layer.spec.format.name == ("e5m2" if index == 1 else "e4m3fn")
        assert layer.spec.full_precision == (index == 3)
        assert (layer.input_scale is not None) == (index % 2 == 0)
        if layer.input_scale is not None:
            assert layer.input_scale == 0.03125


def test_an_input_scale_of_one_means_none_in_the_older_form() -> None:
    tensors = load_file(formats("scaled_fp8_legacy"))
    layers = [name for name in tensors if name.endswith(".scale_input")]
    model = load_mmdit(formats("scaled_fp8_legacy"))
    for name in layers:
        layer = model.get_submodule(name.removeprefix(PREFIX).removesuffix(".scale_input"))
        assert isinstance(layer, Fp8Linear)
        kept = None if layer.input_scale is None else float(layer.input_scale)
        assert kept == (None if tensors[name] == 1 else float(tensors[name]))


def test_a_marker_of_two_elements_asks_for_full_precision(tmp_path: Path) -> None:
    """The file that formats.json calls scaled_fp8_legacy_fullprec, made from its one-element sister."""
    tensors = load_file(formats("scaled_fp8_legacy"))
    tensors = {name: tensor.reshape(1) if name.endswith(SCALES) else tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".scale_input")}
    tensors[f"{PREFIX}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_safetensors(tmp_path / "a.safetensors", tensors)
    model = load_mmdit(tmp_path / "a.safetensors")
    assert all(layer.spec.full_precision and layer.input_scale is None for layer in fp8_layers(model))
    expected = load_file(formats("expected"))["weights_dequantised/scaled_fp8_legacy_fullprec"]
    assert (output(model) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float32], ids=str)
@pytest.mark.parametrize("length", [0, 1])
def test_markers_of_every_kind_in_use_are_understood(tmp_path: Path, dtype: torch.dtype, length: int) -> None:
    tensors = load_file(formats("scaled_fp8_legacy"))
    tensors[f"{PREFIX}scaled_fp8"] = torch.zeros(length, dtype=dtype)
    save_safetensors(tmp_path / "a.safetensors", tensors)
    model = load_mmdit(tmp_path / "a.safetensors")
    assert not any(layer.spec.full_precision for layer in fp8_layers(model))
    assert torch.equal(output(model), output(load_mmdit(formats("scaled_fp8_legacy"))))


def test_only_the_linears_of_a_file_may_be_fp8(tmp_path: Path) -> None:
    """plain_e4m3fn_linear_only of formats.json: biases and norms stay 16-bit, where ComfyUI may round them too."""
    plain, reference = load_file(formats("plain_e4m3fn_all")), load_file(formats("reference_bf16"))
    order = json.loads(golden("comfyui/formats/formats.json").read_text())["quantised_layers_in_index_order"]
    mixed = {**reference, **{key: plain[key] for key in (f"{PREFIX}{name}.weight" for name in order)}}
    save_safetensors(tmp_path / "a.safetensors", mixed)
    expected = load_file(formats("expected"))["weights_dequantised/plain_e4m3fn_linear_only"]
    assert (output(load_mmdit(tmp_path / "a.safetensors")) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("file_has_prefix", [True, False])
@pytest.mark.parametrize("layers_have_prefix", [True, False])
@pytest.mark.parametrize("as_string", [True, False])
def test_header_descriptions_are_found_whatever_their_prefix_and_form(
    tmp_path: Path, file_has_prefix: bool, layers_have_prefix: bool, as_string: bool
) -> None:
    """ComfyUI loses the scales of a prefixed file opened as a diffusion model, and fails on the form it documents."""
    path = formats("quant_metadata_header")
    order = json.loads(golden("comfyui/formats/formats.json").read_text())["quantised_layers_in_index_order"]
    describe: object = "float8_e4m3fn" if as_string else {"format": "float8_e4m3fn"}
    layers = {(PREFIX if layers_have_prefix else "") + name: describe for name in order}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    tensors = load_file(path)
    if not file_has_prefix:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    save_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    assert torch.equal(output(load_mmdit(tmp_path / "a.safetensors")), output(load_mmdit(path)))


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("as_column", [True, False])
def test_scales_by_row_are_read(tmp_path: Path, described: bool, as_column: bool) -> None:
    """Rows scaled by powers of two: the values, and so the output, are exactly those of the file by tensor."""
    tensors = load_file(formats("comfy_quant_layers"))
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        weight = name.removesuffix("_scale")
        rows = tensors[weight].shape[0]
        scale = tensors[name].expand(rows).clone()
        factor = 2.0 ** (torch.arange(rows) % 2)
        halved = tensors[weight].float() / factor[:, None]
        exact = (halved.to(tensors[weight].dtype).float() == halved).all(1)
        factor[~exact] = 1
        tensors[weight] = (tensors[weight].float() / factor[:, None]).to(tensors[weight].dtype)
        tensors[name] = (scale * factor)[:, None] if as_column else scale * factor
    if not described:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".comfy_quant")}
    save_safetensors(tmp_path / "a.safetensors", tensors)
    model = load_mmdit(tmp_path / "a.safetensors")
    assert all(layer.spec.granularity == "row" for layer in fp8_layers(model))
    assert (output(model) - output(load_mmdit(formats("comfy_quant_layers")))).abs().max() < 2e-6


def test_the_scaled_medium_of_diffusers_gives_the_recorded_output() -> None:
    model = load_mmdit(golden("diffusers/transformer_medium_tiny_fp8_scaled.safetensors"))
    inputs = load_file(golden("diffusers/transformer_medium_tiny_io.safetensors"))
    expected = load_file(golden("diffusers/transformer_medium_tiny_fp8_scaled_io.safetensors"))["out.sample"]
    modulation = model.modulation(inputs["in.timestep"], inputs["in.pooled_projections"])
    out = model(inputs["in.hidden_states"], inputs["in.encoder_hidden_states"], modulation)
    assert (out - expected).abs().max() < 2e-5
    assert isinstance(model.context_embedder, Fp8Linear)
