"""CLIP, T5 and the VAE against recorded outputs of transformers, diffusers and ComfyUI."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.models import VAE, ClipConfig, ClipTextEncoder, T5Config, T5Encoder, VAEConfig
from octavo.models.vae import from_latents, to_latents
from tests.goldens import golden
from tests.recipes import vae_weights


def floats(name: str, prefix: str = "") -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value.float() for key, value in load_file(golden(name)).items()}


@pytest.mark.parametrize("name", ["clip_l", "clip_g"])
def test_clip_equals_transformers(name: str) -> None:
    facts = json.loads(golden(f"diffusers/{name}_tiny_config.json").read_text())
    io = load_file(golden(f"diffusers/{name}_tiny_io.safetensors"))
    config = ClipConfig(
        width=facts["hidden_size"],
        layers=facts["num_hidden_layers"],
        heads=facts["num_attention_heads"],
        mlp_width=facts["intermediate_size"],
        activation=facts["hidden_act"],
        vocab_size=facts["vocab_size"],
        projection=facts["projection_dim"],
    )
    encoder = ClipTextEncoder(config)
    encoder.load_state_dict(floats(f"diffusers/{name}_tiny.safetensors"))
    tokens = io["in.input_ids"]
    end = (tokens == facts["eos_token_id"]).int().argmax(dim=1)
    hidden, pooled = encoder(tokens, end=end)
    torch.testing.assert_close(hidden, io["out.hidden_state_2"], atol=2e-5, rtol=0)
    torch.testing.assert_close(pooled, io["out.text_embeds"], atol=2e-5, rtol=0)
    for skip in (1, 2, 3):
        hidden, _ = encoder(tokens, end=end, clip_skip=skip)
        torch.testing.assert_close(hidden, io[f"out.hidden_state_{4 - skip}"], atol=2e-5, rtol=0)


def test_clip_vector_takes_the_place_of_a_token() -> None:
    config = ClipConfig(width=64, layers=2, heads=1, mlp_width=64, activation="gelu", vocab_size=10, positions=5)
    encoder = ClipTextEncoder(config)
    tokens, end = torch.tensor([[1, 2, 3, 9, 0]]), torch.tensor([3])
    embedding = encoder.text_model.embeddings.token_embedding.weight
    expected = encoder(torch.tensor([[1, 7, 3, 9, 0]]), end=end)
    given = encoder(tokens, end=end, vectors={(0, 1): embedding[7].clone()})
    for ours, theirs in zip(given, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_t5_equals_transformers() -> None:
    facts = json.loads(golden("diffusers/t5_tiny_config.json").read_text())
    io = load_file(golden("diffusers/t5_tiny_io.safetensors"))
    config = T5Config(
        width=facts["d_model"],
        layers=facts["num_layers"],
        heads=facts["num_heads"],
        head_width=facts["d_kv"],
        mlp_width=facts["d_ff"],
        vocab_size=facts["vocab_size"],
    )
    encoder = T5Encoder(config)
    encoder.load_state_dict(floats("diffusers/t5_tiny.safetensors"))
    out = encoder(io["in.input_ids"])
    torch.testing.assert_close(out, io["out.last_hidden_state"], atol=2e-5, rtol=0)


def test_vae_equals_diffusers() -> None:
    io = load_file(golden("diffusers/vae_tiny_io.safetensors"))
    vae = VAE(VAEConfig(channels=(32, 32, 32, 64), layers_per_block=1))
    weights = floats("diffusers/vae_tiny_single_file.safetensors", "first_stage_model.")
    vae.load_state_dict(weights)
    torch.testing.assert_close(vae.encode(io["in.image"]), io["out.encode_moments"], atol=5e-5, rtol=0)
    torch.testing.assert_close(vae.decode(io["in.latent"]), io["out.decode"], atol=5e-5, rtol=0)


def test_full_size_vae_equals_comfyui() -> None:
    description = golden("comfyui/vae.json")
    io = load_file(golden("comfyui/vae.safetensors"))
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    vae.load_state_dict(vae_weights(description), assign=True)
    torch.testing.assert_close(vae.decode(io["decode/in_latent"]), io["decode/raw_out"], atol=1e-4, rtol=0)
    image = io["encode/in_image"][:, 1:49, 1:81]  # the middle whose sides 8 divides, as recorded
    moments = vae.encode(2 * image.movedim(-1, 1) - 1)
    torch.testing.assert_close(moments, io["encode/moments"], atol=1e-4, rtol=0)


def test_what_the_vae_gives_lies_in_memory_as_its_shape_says() -> None:
    """Files and kernels take it as it is, whatever layout its convolutions like."""
    vae = VAE(VAEConfig(channels=(8, 8, 8, 8), layers_per_block=1, groups=4)).requires_grad_(False)
    moments = vae.encode(torch.randn(2, 3, 32, 16))
    assert moments.is_contiguous()
    assert vae.decode(moments[:, :16]).is_contiguous()


def test_latents_of_the_model_and_of_the_vae_are_mapped_as_comfyui_maps_them() -> None:
    table = json.loads(golden("comfyui/vae.json").read_text())["process_in_table"]
    z = torch.tensor(table["in"])
    torch.testing.assert_close(to_latents(z), torch.tensor(table["process_in"]))
    torch.testing.assert_close(from_latents(z), torch.tensor(table["process_out"]))


def test_building_on_the_meta_device_does_not_load_torch_s_compiler() -> None:
    """It takes longer to import than a small model takes to draw."""
    code = (
        "import sys, torch\n"
        "from octavo.models import *\n"
        "with torch.device('meta'):\n"
        "    T5Encoder(T5Config.xxl()), ClipTextEncoder(ClipConfig.clip_g())\n"
        "    MMDiT(MMDiTConfig.medium()), VAE(VAEConfig())\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("build", "weights"),
    [
        (lambda: ClipTextEncoder(ClipConfig.clip_l()), 123.06e6),
        (lambda: ClipTextEncoder(ClipConfig.clip_g()), 694.66e6),
        (lambda: T5Encoder(T5Config.xxl()), 4.762e9),
        (lambda: VAE(VAEConfig()), 83.82e6),
    ],
)
def test_released_sizes(build: object, weights: float) -> None:
    """As published: CLIP ViT-L/14 and OpenCLIP bigG text towers, T5 v1.1 XXL's encoder, SD3's VAE."""
    with torch.device("meta"):
        model = build()  # type: ignore[operator]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(weights, rel=1e-3)
