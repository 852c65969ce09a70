"""Whole and tiled decoding."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.models import VAE, VAEConfig
from octavo.models.vae import from_latents, to_latents
from octavo.pipeline.decode import blend_tiles, decode, encode_image, to_uint8
from tests.goldens import golden
from tests.recipes import vae_weights


def double(x: Tensor) -> Tensor:
    """A stand-in for a VAE that looks at single pixels only, so that tiling must not change anything."""
    return torch.nn.functional.interpolate(x, scale_factor=2)


@pytest.mark.parametrize("size", [(8, 8), (9, 17), (23, 5), (64, 40)])
@pytest.mark.parametrize(("tile", "overlap"), [((8, 8), 2), ((6, 10), 3), ((5, 5), 0), ((100, 100), 4)])
def test_tiles_of_a_pointwise_function_give_the_function_itself(
    size: tuple[int, int], tile: tuple[int, int], overlap: int
) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(blend_tiles(double, x, tile=tile, overlap=overlap, factor=2), double(x))


def test_average_of_three_tilings_equals_comfyui() -> None:
    """ComfyUI's tiled decoding is the mean over tiles as given, half as wide and half as high."""
    io = load_file(golden("comfyui/vae.safetensors"))
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    vae.load_state_dict(vae_weights(golden("comfyui/vae.json")), assign=True)
    z = io["tiled/in_latent"]
    passes = [blend_tiles(vae.decode, z, tile=t, overlap=2, factor=8) for t in ((8, 8), (16, 4), (4, 16))]
    pixels = (sum(passes, torch.zeros(())) / 3).clamp(-1, 1)
    ours = ((pixels + 1) / 2).movedim(1, -1)
    torch.testing.assert_close(ours, io["tiled/out_image_tile8_overlap2"], atol=1e-4, rtol=0)
    whole = (decode(vae, to_latents(z)) + 1) / 2
    torch.testing.assert_close(whole.movedim(1, -1), io["tiled/out_image_untiled"], atol=1e-4, rtol=0)


def test_encoded_image_is_the_mean_as_the_mmdit_sees_it() -> None:
    io = load_file(golden("comfyui/vae.safetensors"))
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    vae.load_state_dict(vae_weights(golden("comfyui/vae.json")), assign=True)
    pixels = 2 * io["encode/in_image"][:, 1:49, 1:81].movedim(-1, 1) - 1
    torch.testing.assert_close(from_latents(encode_image(vae, pixels)), io["encode/out_latent"], atol=1e-4, rtol=0)


def test_every_level_of_a_picture_survives_the_way_to_pixels_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_uint8(levels.float().movedim(-1, 1) / 127.5 - 1), levels)
