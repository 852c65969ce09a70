"""Quick looks at pictures that are not finished."""

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from octavo.models import VAE
from octavo.pipeline.decode import decode, to_uint8

if TYPE_CHECKING:
    from octavo.pipeline.components import Part


def preview(denoised: Tensor, vae: "Part[VAE] | None") -> Image.Image:
    """A quick look at unfinished latents [1, 16, h, w]: by the VAE where it is small, else by the channels' colours."""
    # A VAE that comes and goes is not called beside the device's own work.
    if vae is not None and not (vae.stay is not None and vae.stay.leaves):
        # Half its size is a quarter of the work, and as much as an unfinished picture has to show.
        pixels = to_uint8(decode(vae(), avg_pool2d(denoised, 2, ceil_mode=True)))
    else:
        factors = torch.tensor(LATENT_TO_RGB, dtype=torch.float32)
        rgb = denoised.float().cpu().movedim(1, -1) @ factors + torch.tensor(LATENT_TO_RGB_BIAS)
        pixels = to_uint8(rgb.movedim(-1, 1))
    return Image.fromarray(pixels[0].cpu().numpy())


# Least-squares colours of the released VAE's latent channels, as ComfyUI uses them for its previews of SD3.
LATENT_TO_RGB = (
    (-0.0922, -0.0175, 0.0749), (0.0311, 0.0633, 0.0954), (0.1994, 0.0927, 0.0458), (0.0856, 0.0339, 0.0902),
    (0.0587, 0.0272, -0.0496), (-0.0006, 0.1104, 0.0309), (0.0978, 0.0306, 0.0427), (-0.0042, 0.1038, 0.1358),
    (-0.0194, 0.0020, 0.0669), (-0.0488, 0.0130, -0.0268), (0.0922, 0.0988, 0.0951), (-0.0278, 0.0524, -0.0542),
    (0.0332, 0.0456, 0.0895), (-0.0069, -0.0030, -0.0810), (-0.0596, -0.0465, -0.0293), (-0.1448, -0.1463, -0.1189),
)  # fmt: skip
LATENT_TO_RGB_BIAS = (0.2394, 0.2135, 0.1925)
