"""What a run starts from: noise, or a picture mixed with it; and which part of the picture."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from octavo.models.vae import VAE
from octavo.pipeline.decode import encode_image

CHANNELS = 16
FACTOR = 8  # pixels a latent pixel covers along one side


def latent_shape(width: int, height: int) -> tuple[int, int, int, int]:
    """Shape of the latents of one picture, sides in pixels."""
    return (1, CHANNELS, height // FACTOR, width // FACTOR)


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture in RGB, upright, scaled and cropped around its middle to the given size; transparency on white."""
    image = upright(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF says that it is held."""
    return ImageOps.exif_transpose(image)


def pixels_of(image: Image.Image) -> Tensor:
    """[1, 3, H, W] float32 in [-1, 1] of an RGB picture."""
    # bytearray, for torch warns of memory that it may not write to.
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return (flat.view(1, image.height, image.width, 3).movedim(-1, 1).float() / 127.5) - 1


def latents_of(image: Image.Image, vae: VAE, *, width: int, height: int) -> Tensor:
    """Latents [1, 16, h, w] of a picture of any size, on the VAE's device."""
    device = next(vae.parameters()).device
    return encode_image(vae, pixels_of(fitted(image, width, height)).to(device))


def mask_of(image: Image.Image, *, width: int, height: int) -> Tensor:
    """The mask [1, 1, h, w] of a picture of any size: white is 1, draw anew; fitted as pictures are by `fitted`."""
    grey = fitted(image, width, height).convert("L")
    flat = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8)
    return latent_mask(flat.view(1, height, width).float() / 255, (height // FACTOR, width // FACTOR))


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask [B, H, W] or [B, 1, H, W] of any size for latents of `size`: [B, 1, h, w], bilinear as ComfyUI's."""
    return F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), size=size, mode="bilinear")
