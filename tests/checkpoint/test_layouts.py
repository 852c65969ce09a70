"""One model, however its files are laid out: the weights that arrive are equal to the last bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from octavo.checkpoint import load_clip, load_mmdit, load_t5, load_vae
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.source import open_source
from octavo.fp8 import Fp8Linear
from tests.checkpoint.samples import (
    MMDIT_PREFIX,
    VAE_PREFIX,
    all_in_one,
    mmdit_in_diffusers,
    recorded,
    tiny,
    vae_in_diffusers,
    write_diffusers_folder,
    write_shards,
)
from tests.goldens import golden

Clip = Literal["clip_l", "clip_g"]


def assert_holds(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """The model's weights are the expected ones, widened to float32."""
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name].float()), name


def without_projection(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "text_projection.weight"}


@pytest.mark.parametrize("name", ["transformer_large_tiny", "transformer_medium_tiny"])
def test_the_recorded_models_give_their_recorded_outputs(tmp_path: Path, name: str) -> None:
    """From the single file, and from the layout of diffusers that its rules give."""
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", mmdit_in_diffusers(recorded(name, MMDIT_PREFIX)))
    io = load_file(golden(f"diffusers/{name}_io.safetensors"))
    for path in (golden(f"diffusers/{name}.safetensors"), tmp_path):
        model = load_mmdit(path)
        modulation = model.modulation(io["in.timestep"], io["in.pooled_projections"])
        out = model(io["in.hidden_states"], io["in.encoder_hidden_states"], modulation)
        assert (out - io["out.sample"]).abs().max() < 2e-5


def test_the_recorded_vae_gives_its_recorded_outputs(tmp_path: Path) -> None:
    tensors = vae_in_diffusers(recorded("vae_tiny_single_file", VAE_PREFIX))
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    (tmp_path / "config.json").write_text(golden("diffusers/vae_tiny_config.json").read_text())
    io = load_file(golden("diffusers/vae_tiny_io.safetensors"))
    vae = load_vae(tmp_path)
    assert (vae.encode(io["in.image"]) - io["out.encode_moments"]).abs().max() < 5e-5
    assert (vae.decode(io["in.latent"]) - io["out.decode"]).abs().max() < 5e-5


@pytest.mark.parametrize("prefix", ["", MMDIT_PREFIX, "diffusion_model.", "transformer."])
def test_an_mmdit_under_every_prefix(tmp_path: Path, prefix: str) -> None:
    save_safetensors(tmp_path / "a.safetensors", {prefix + key: tensor for key, tensor in tiny("mmdit").items()})
    assert_holds(load_mmdit(tmp_path / "a.safetensors"), tiny("mmdit"))


@pytest.mark.parametrize("prefix", ["", VAE_PREFIX, "vae."])
def test_a_vae_under_every_prefix(tmp_path: Path, prefix: str) -> None:
    save_safetensors(tmp_path / "a.safetensors", {prefix + key: tensor for key, tensor in tiny("vae").items()})
    assert_holds(load_vae(tmp_path / "a.safetensors"), tiny("vae"))


@pytest.mark.parametrize("encoder", ["clip_l", "clip_g"])
@pytest.mark.parametrize("prefix", ["", "{}.", "{}.transformer.", "text_encoders.{}.transformer."])
def test_a_clip_under_every_prefix(tmp_path: Path, encoder: Clip, prefix: str) -> None:
    tensors = {prefix.format(encoder) + key: tensor for key, tensor in tiny(encoder).items()}
    save_safetensors(tmp_path / f"{encoder}.safetensors", tensors)
    clip = load_clip(tmp_path / f"{encoder}.safetensors")
    assert clip.config.activation == ("quick_gelu" if encoder == "clip_l" else "gelu")
    assert_holds(clip, without_projection(tiny("clip_l")) if encoder == "clip_l" else tiny("clip_g"))


@pytest.mark.parametrize("prefix", ["", "t5xxl.", "t5xxl.transformer.", "text_encoders.t5xxl.transformer."])
def test_a_t5_under_every_prefix(tmp_path: Path, prefix: str) -> None:
    save_safetensors(tmp_path / "a.safetensors", {prefix + key: tensor for key, tensor in tiny("t5").items()})
    assert_holds(load_t5(tmp_path / "a.safetensors"), tiny("t5"))


def test_an_mmdit_in_diffusers_layout(tmp_path: Path) -> None:
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_safetensors(file, mmdit_in_diffusers(tiny("mmdit")))
    assert_holds(load_mmdit(tmp_path), tiny("mmdit"))
    assert_holds(load_mmdit(file), tiny("mmdit"))


def test_shards_with_an_index(tmp_path: Path) -> None:
    assert_holds(load_mmdit(write_shards(tmp_path, "model", tiny("mmdit"), 4)), tiny("mmdit"))


def test_an_all_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "sd3.5_tiny.safetensors"
    save_safetensors(path, all_in_one())
    with open_source(path) as source:
        assert [located.part.kind for located in source.parts] == ["mmdit", "clip_l", "clip_g", "t5", "vae"]
    assert_all_parts(path)


def test_a_diffusers_folder(tmp_path: Path) -> None:
    """What shapes do not tell comes from the config.json of each part."""
    write_diffusers_folder(tmp_path)
    assert_all_parts(tmp_path)
    assert load_clip(tmp_path, "clip_l").config.heads == 4
    assert load_clip(tmp_path, "clip_g").config.heads == 5
    assert load_vae(tmp_path).config.groups == 16


def assert_all_parts(path: Path) -> None:
    assert_holds(load_mmdit(path), tiny("mmdit"))
    assert_holds(load_clip(path, "clip_l"), without_projection(tiny("clip_l")))
    assert_holds(load_clip(path, "clip_g"), tiny("clip_g"))
    assert_holds(load_t5(path), tiny("t5"))
    assert_holds(load_vae(path), tiny("vae"))


def test_variants_of_diffusers_files_are_found(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors", vae_in_diffusers(tiny("vae")))
    index = write_shards(tmp_path / "transformer", "model", mmdit_in_diffusers(tiny("mmdit")), 2)
    index.rename(index.with_name("model.safetensors.index.fp16.json"))
    assert_holds(load_vae(tmp_path), tiny("vae"))
    assert_holds(load_mmdit(tmp_path), tiny("mmdit"))


@pytest.mark.parametrize("old", [False, True])
def test_attention_of_diffusers_vaes_under_both_names(tmp_path: Path, old: bool) -> None:
    save_safetensors(tmp_path / "model.safetensors", vae_in_diffusers(tiny("vae"), old=old))
    assert_holds(load_vae(tmp_path), tiny("vae"))


def test_a_projection_kept_as_a_bare_parameter_is_turned(tmp_path: Path) -> None:
    tensors = tiny("clip_g")
    tensors["text_projection"] = tensors.pop("text_projection.weight").t().contiguous()
    save_safetensors(tmp_path / "clip_g.safetensors", tensors)
    assert_holds(load_clip(tmp_path / "clip_g.safetensors"), tiny("clip_g"))


def test_t5_may_keep_its_embedding_under_the_other_name(tmp_path: Path) -> None:
    tensors = tiny("t5")
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_safetensors(tmp_path / "t5.safetensors", tensors)
    assert_holds(load_t5(tmp_path / "t5.safetensors"), tiny("t5"))


@pytest.mark.parametrize(
    ("kind", "surplus"),
    [
        ("clip_l", ["text_model.embeddings.position_ids", "logit_scale", "text_projection"]),
        ("clip_g", ["text_model.embeddings.position_ids", "logit_scale", "vision_model.x", "visual_projection.weight"]),
        ("t5", ["encoder.embed_tokens.weight", "decoder.block.0.x", "lm_head.weight", "logit_scale", "spiece_model"]),
        ("vae", ["loss.logvar", "model_ema.decay"]),
    ],
)
def test_what_real_files_carry_along_is_left_aside(tmp_path: Path, kind: str, surplus: list[str]) -> None:
    load: Callable[[Path], nn.Module] = {"t5": load_t5, "vae": load_vae}.get(kind, load_clip)
    tensors = tiny(kind)  # type: ignore[arg-type]
    path = tmp_path / f"{kind}.safetensors"
    save_safetensors(path, {**tensors, **{name: torch.zeros(1) for name in surplus}})
    assert_holds(load(path), without_projection(tensors) if kind == "clip_l" else tensors)


def in_fp8(tensors: dict[str, Tensor], scale_of: Callable[[str], float | None]) -> dict[str, Tensor]:
    """Linear weights of the blocks in FP8, each with the scale that `scale_of` gives it, or none."""
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


def fp8_layer(model: nn.Module, name: str) -> Fp8Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, Fp8Linear)
    return layer


def test_fp8_in_diffusers_layout_becomes_the_same_matrices(tmp_path: Path) -> None:
    """Scales that differ between q, k and v become scales by row; halves that change places take theirs along."""
    tensors = in_fp8(mmdit_in_diffusers(tiny("mmdit")), lambda name: 0.125 if "to_q" in name else 0.25)
    adaln = "transformer_blocks.1.norm1_context.linear.weight"
    rows = torch.linspace(0.5, 1.5, tensors[adaln].shape[0])[:, None]
    tensors[f"{adaln}_scale"] = rows
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    model = load_mmdit(tmp_path)
    assert fp8_layer(model, "joint_blocks.0.x_block.attn.qkv").scale.flatten().tolist() == [0.125] * 128 + [0.25] * 256
    assert fp8_layer(model, "joint_blocks.0.x_block.attn.proj").scale.shape == ()
    last = fp8_layer(model, "joint_blocks.1.context_block.adaLN_modulation.1")
    expected = tensors[adaln].float() * rows
    assert torch.equal(last.q.float() * last.scale, torch.cat(expected.chunk(2)[::-1]))


def test_a_fused_matrix_whose_pieces_are_only_partly_fp8_is_dequantized(tmp_path: Path) -> None:
    tensors = mmdit_in_diffusers(tiny("mmdit"))
    name = "transformer_blocks.0.attn.to_k.weight"
    codes = tensors[name].to(torch.float8_e4m3fn)
    tensors |= {name: codes, f"{name}_scale": torch.tensor(0.5)}
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    weight = load_mmdit(tmp_path).get_parameter("joint_blocks.0.x_block.attn.qkv.weight")
    assert torch.equal(weight[128:256], codes.float() * 0.5)
    assert torch.equal(weight[:128], tensors["transformer_blocks.0.attn.to_q.weight"].float())


def test_input_scales_of_a_fused_matrix_give_the_largest(tmp_path: Path) -> None:
    tensors = in_fp8(mmdit_in_diffusers(tiny("mmdit")), lambda _: 0.25)
    for name, scale in (("to_q", 0.1), ("to_k", 0.3), ("to_v", 0.2)):
        tensors[f"transformer_blocks.0.attn.{name}.input_scale"] = torch.tensor(scale)
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    assert fp8_layer(load_mmdit(tmp_path), "joint_blocks.0.x_block.attn.qkv").input_scale == torch.tensor(0.3)


def test_t5_in_plain_fp8_keeps_its_matrices_and_widens_the_rest(tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tiny("t5").items()}
    save_safetensors(tmp_path / "t5xxl_fp8_e4m3fn.safetensors", tensors)
    t5 = load_t5(tmp_path / "t5xxl_fp8_e4m3fn.safetensors", dtype=torch.bfloat16)
    assert sum(isinstance(module, Fp8Linear) for module in t5.modules()) == 3 * 7
    assert t5.shared.weight.dtype == torch.bfloat16
    assert torch.equal(t5.shared.weight, tensors["shared.weight"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_of_file_and_model_are_independent(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tiny("mmdit").items()}
    save_safetensors(tmp_path / "a.safetensors", tensors)
    for wanted in (torch.float32, torch.bfloat16, torch.float16):
        model = load_mmdit(tmp_path / "a.safetensors", dtype=wanted)
        assert all(torch.equal(tensor, tensors[name].to(wanted)) for name, tensor in model.state_dict().items())


def test_a_loaded_model_is_ready_for_inference(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a.safetensors", tiny("mmdit"))
    model = load_mmdit(tmp_path / "a.safetensors")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_part_knows_its_prefix_and_leaves_what_belongs_to_others(tmp_path: Path) -> None:
    """A prefix-less model beside a prefixed VAE: neither takes the other's tensors for surplus."""
    tensors = tiny("mmdit") | {VAE_PREFIX + key: tensor for key, tensor in tiny("vae").items()}
    save_safetensors(tmp_path / "a.safetensors", tensors, {"octavo.config": json.dumps({"groups": 4})})
    with open_source(tmp_path / "a.safetensors") as source:
        assert [(located.part.kind, located.part.prefix) for located in source.parts] == [
            ("mmdit", ""),
            ("vae", VAE_PREFIX),
        ]
    assert_holds(load_mmdit(tmp_path / "a.safetensors"), tiny("mmdit"))
    assert load_vae(tmp_path / "a.safetensors").config.groups == 4
