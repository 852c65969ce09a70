"""One model, however its files are laid out: single, prefix-less, all in one, sharded, diffusers; outputs recorded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.checkpoint import load_clip, load_mmdit, load_t5, load_vae
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.source import open_source
from octavo.fp8 import Fp8Linear
from octavo.models import VAE, MMDiT
from tests.checkpoint.samples import (
    ENCODERS,
    MMDIT_PREFIX,
    all_in_one,
    mmdit_in_diffusers,
    tiny,
    tiny_mmdit,
    tiny_vae,
    vae_in_diffusers,
    write_diffusers_folder,
    write_shards,
)
from tests.goldens import golden


def difference(model: MMDiT, name: str) -> float:
    """Largest difference of the recorded outputs, the one with a skipped block too."""
    io = load_file(golden(f"diffusers/{name}_io.safetensors"))
    modulation = model.modulation(io["in.timestep"], io["in.pooled_projections"])
    worst = 0.0
    for key, skip in (("sample", ()), ("sample_skip_layers_0", (0,)), ("sample_skip_layers_1", (1,))):
        if f"out.{key}" in io:
            out = model(io["in.hidden_states"], io["in.encoder_hidden_states"], modulation, skip_layers=skip)
            worst = max(worst, float((out - io[f"out.{key}"]).abs().max()))
    return worst


def vae_difference(vae: VAE) -> float:
    io = load_file(golden("diffusers/vae_tiny_io.safetensors"))
    moments, pixels = vae.encode(io["in.image"]), vae.decode(io["in.latent"])
    return float(max((moments - io["out.encode_moments"]).abs().max(), (pixels - io["out.decode"]).abs().max()))


MODELS = pytest.mark.parametrize("name", ["transformer_large_tiny", "transformer_medium_tiny"])


@MODELS
def test_single_file_with_prefix(name: str) -> None:
    assert difference(load_mmdit(golden(f"diffusers/{name}.safetensors")), name) < 2e-5


@MODELS
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer."])
def test_other_prefixes_and_none(tmp_path: Path, name: str, prefix: str) -> None:
    save_safetensors(tmp_path / "a.safetensors", {prefix + key: tensor for key, tensor in tiny_mmdit(name).items()})
    assert difference(load_mmdit(tmp_path / "a.safetensors"), name) < 2e-5


@MODELS
def test_diffusers_layout(tmp_path: Path, name: str) -> None:
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", mmdit_in_diffusers(tiny_mmdit(name)))
    assert difference(load_mmdit(tmp_path), name) < 2e-5
    assert difference(load_mmdit(tmp_path / "diffusion_pytorch_model.safetensors"), name) < 2e-5


@MODELS
def test_shards_with_an_index(tmp_path: Path, name: str) -> None:
    index = write_shards(tmp_path, "model", tiny_mmdit(name), 4)
    assert difference(load_mmdit(index), name) < 2e-5


def test_all_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "sd3.5_tiny.safetensors"
    config = {"octavo.config": json.dumps({"groups": 32})}
    save_safetensors(path, all_in_one(), config)
    with open_source(path) as source:
        assert [located.part.kind for located in source.parts] == ["mmdit", "clip_l", "clip_g", "t5", "vae"]
    assert difference(load_mmdit(path), "transformer_medium_tiny") < 2e-5
    assert vae_difference(load_vae(path)) < 5e-5
    for which, name in (("clip_l", "clip_l_tiny"), ("clip_g", "clip_g_tiny")):
        clip = load_clip(path, which)  # type: ignore[arg-type]
        expected = tiny(name)
        state = clip.state_dict()
        assert state.keys() == expected.keys() - ({"text_projection.weight"} if which == "clip_l" else set())
        assert all(torch.equal(state[key], expected[key].float()) for key in state)
    assert torch.equal(load_t5(path).shared.weight, tiny("t5_tiny")["shared.weight"].float())


def test_diffusers_folder(tmp_path: Path) -> None:
    write_diffusers_folder(tmp_path)
    assert difference(load_mmdit(tmp_path), "transformer_medium_tiny") < 2e-5
    assert vae_difference(load_vae(tmp_path)) < 5e-5

    io = load_file(golden("diffusers/t5_tiny_io.safetensors"))
    assert (load_t5(tmp_path)(io["in.input_ids"]) - io["out.last_hidden_state"]).abs().max() < 2e-5
    for which, end_token in (("clip_l", 499), ("clip_g", 499)):
        io = load_file(golden(f"diffusers/{which}_tiny_io.safetensors"))
        ids = io["in.input_ids"]
        end = (ids == end_token).int().argmax(dim=1)
        hidden, pooled = load_clip(tmp_path, which)(ids, end=end)  # type: ignore[arg-type]
        assert (hidden - io["out.hidden_state_2"]).abs().max() < 2e-5
        if which == "clip_g":
            assert (pooled - io["out.text_embeds"]).abs().max() < 2e-5


def test_variants_of_diffusers_files_are_found(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors", vae_in_diffusers(tiny_vae()))
    (tmp_path / "vae" / "config.json").write_text(golden("diffusers/vae_tiny_config.json").read_text())
    assert vae_difference(load_vae(tmp_path)) < 5e-5


@pytest.mark.parametrize("old", [False, True])
def test_attention_of_diffusers_vaes_under_both_names(tmp_path: Path, old: bool) -> None:
    save_safetensors(tmp_path / "model.safetensors", vae_in_diffusers(tiny_vae(), old=old))
    (tmp_path / "config.json").write_text(golden("diffusers/vae_tiny_config.json").read_text())
    assert vae_difference(load_vae(tmp_path)) < 5e-5


@pytest.mark.parametrize("encoder", ["clip_l", "clip_g"])
@pytest.mark.parametrize("prefix", ["", "{}.", "{}.transformer.", "text_encoders.{}.transformer."])
def test_clip_under_every_prefix(tmp_path: Path, encoder: str, prefix: str) -> None:
    tensors = {prefix.format(encoder) + key: tensor for key, tensor in tiny(ENCODERS[encoder]).items()}
    path = tmp_path / f"{encoder}.safetensors"
    save_safetensors(path, tensors)
    clip = load_clip(path)
    assert clip.config.activation == ("quick_gelu" if encoder == "clip_l" else "gelu")
    assert clip.config.projection == (None if encoder == "clip_l" else 80)


def test_a_projection_kept_as_a_bare_parameter_is_turned(tmp_path: Path) -> None:
    tensors = tiny("clip_g_tiny")
    expected = tensors.pop("text_projection.weight")
    tensors["text_projection"] = expected.t().contiguous()
    save_safetensors(tmp_path / "clip_g.safetensors", tensors)
    assert torch.equal(load_clip(tmp_path / "clip_g.safetensors").text_projection.weight, expected.float())


def test_t5_may_keep_its_embedding_under_the_other_name(tmp_path: Path) -> None:
    tensors = tiny("t5_tiny")
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_safetensors(tmp_path / "t5.safetensors", tensors)
    assert torch.equal(load_t5(tmp_path / "t5.safetensors").shared.weight, tiny("t5_tiny")["shared.weight"].float())


def in_fp8(tensors: dict[str, Tensor], scale_of: Callable[[str], float | None]) -> dict[str, Tensor]:
    """Linear weights of the blocks in FP8, each with the scale that `scale_of` gives it, a power of two, or none."""
    out = {}
    for name, tensor in tensors.items():
        if "blocks." in name and name.endswith(".weight") and tensor.ndim == 2:
            scale = scale_of(name)
            out[name] = (tensor.float() / (scale or 1)).to(torch.float8_e4m3fn)
            if scale is not None:
                out[name.removesuffix("weight") + "weight_scale"] = torch.tensor(scale)
        else:
            out[name] = tensor
    return out


def test_fp8_in_diffusers_layout_becomes_the_same_matrices(tmp_path: Path) -> None:
    """Scales that differ between q, k and v become scales by row; halves that change places take theirs along."""

    def scale_of(name: str) -> float:
        return 2.0 ** -("q_proj" in name or "to_q" in name) * 0.25

    tensors = in_fp8(mmdit_in_diffusers(tiny_mmdit()), scale_of)
    adaln = "transformer_blocks.1.norm1_context.linear.weight"
    rows = torch.linspace(0.5, 1.5, tensors[adaln].shape[0])[:, None]
    tensors[f"{adaln}_scale"] = rows
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    model = load_mmdit(tmp_path)

    qkv = model.get_submodule("joint_blocks.0.x_block.attn.qkv")
    assert isinstance(qkv, Fp8Linear)
    assert qkv.scale.flatten().tolist() == [0.125] * 128 + [0.25] * 256
    proj = model.get_submodule("joint_blocks.0.x_block.attn.proj")
    assert isinstance(proj, Fp8Linear)
    assert proj.scale.shape == ()
    last = model.get_submodule("joint_blocks.1.context_block.adaLN_modulation.1")
    assert isinstance(last, Fp8Linear)
    expected = tensors[adaln].float() * rows
    assert torch.equal(last.q.float() * last.scale, torch.cat(expected.chunk(2)[::-1]))


def test_a_fused_matrix_whose_pieces_are_only_partly_fp8_is_dequantized(tmp_path: Path) -> None:
    tensors = mmdit_in_diffusers(tiny_mmdit())
    name = "transformer_blocks.0.attn.to_k.weight"
    codes = tensors[name].to(torch.float8_e4m3fn)
    tensors |= {name: codes, f"{name}_scale": torch.tensor(0.5)}
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    weight = load_mmdit(tmp_path).get_parameter("joint_blocks.0.x_block.attn.qkv.weight")
    assert torch.equal(weight[128:256], codes.float() * 0.5)
    assert torch.equal(weight[:128], tensors["transformer_blocks.0.attn.to_q.weight"].float())


def test_input_scales_of_a_fused_matrix_give_the_largest(tmp_path: Path) -> None:
    tensors = in_fp8(mmdit_in_diffusers(tiny_mmdit()), lambda _: 0.25)
    for name, scale in (("to_q", 0.1), ("to_k", 0.3), ("to_v", 0.2)):
        tensors[f"transformer_blocks.0.attn.{name}.input_scale"] = torch.tensor(scale)
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    qkv = load_mmdit(tmp_path).get_submodule("joint_blocks.0.x_block.attn.qkv")
    assert isinstance(qkv, Fp8Linear)
    assert qkv.input_scale == torch.tensor(0.3)


def test_t5_in_plain_fp8_keeps_its_matrices_and_widens_the_rest(tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tiny("t5_tiny").items()}
    save_safetensors(tmp_path / "t5xxl_fp8_e4m3fn.safetensors", tensors)
    t5 = load_t5(tmp_path / "t5xxl_fp8_e4m3fn.safetensors", dtype=torch.bfloat16)
    assert sum(isinstance(module, Fp8Linear) for module in t5.modules()) == 3 * 7
    assert t5.shared.weight.dtype == torch.bfloat16
    assert torch.equal(t5.shared.weight, tensors["shared.weight"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_of_file_and_model_are_independent(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tiny_mmdit().items()}
    save_safetensors(tmp_path / f"{dtype}.safetensors", tensors)
    for wanted in (torch.float32, torch.bfloat16, torch.float16):
        model = load_mmdit(tmp_path / f"{dtype}.safetensors", dtype=wanted)
        assert all(torch.equal(tensor, tensors[name].to(wanted)) for name, tensor in model.state_dict().items())


def test_a_loaded_model_is_ready_for_inference() -> None:
    model = load_mmdit(golden("diffusers/transformer_large_tiny.safetensors"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_prefix_of_the_model_is_that_of_the_file() -> None:
    with open_source(golden("diffusers/transformer_large_tiny.safetensors")) as source:
        part = source.require("mmdit").part
    assert (part.prefix, part.style) == (MMDIT_PREFIX, "single-file")
