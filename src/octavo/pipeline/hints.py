"""Control pictures as ControlNets see them: scaled in size and value, then encoded by the VAE.

What the values become depends on what the net was trained with. `x` is a pixel from 0 to 1:

    blur, and nets that do not say   2x - 1, as every picture
    depth                            2x - 1, near is bright; ComfyUI gives 1 - 2x
    canny                            127.5x + 0.5, far outside what the VAE was made for; ComfyUI gives 255x

The nets in diffusers' layout that take no pooled text were trained on latents that are scaled but not shifted.

Sources: Stability AI's `sd3.5` (`vae_encode`), diffusers' SD3ControlNetPipeline and SD3CannyImageProcessor; ComfyUI's
numbers as its `ControlNetSD35` has them.
"""

from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

from octavo.models import VAE, ControlNetConfig
from octavo.models.vae import SCALE, to_latents
from octavo.pipeline.latents import FACTOR
from octavo.pipeline.resize import resize


def scaled(pixels: Tensor, config: ControlNetConfig, *, comfyui: bool = False) -> Tensor:
    """Pixels in [0, 1] as the VAE is given them for this net, same shape; see the module.

    Args:
        comfyui: with ComfyUI's numbers for canny and depth.
    """
    if config.control_type == "canny":
        return pixels * 255 if comfyui else pixels * 127.5 + 0.5
    if config.control_type == "depth" and comfyui:
        return 1 - 2 * pixels
    return 2 * pixels - 1


def encode_hint(vae: VAE, pixels: Tensor, config: ControlNetConfig, *, comfyui: bool = False) -> Tensor:
    """Latents of a control picture, as the net sees them.

    Args:
        vae: encodes in its own dtype.
        pixels: [B, 3, H, W] in [0, 1], sides divisible by 8.
        comfyui: as `scaled`.

    Returns:
        [B, 16, H/8, W/8] float32.
    """
    first = next(vae.parameters())
    mean = vae.encode(scaled(pixels.to(first.device), config, comfyui=comfyui).to(first.dtype))[:, :16].float()
    return mean * SCALE if config.zero_pooled else to_latents(mean)


class ControlPicture:
    """A control picture for latents of any size, encoded for each size once."""

    def __init__(
        self, pixels: Tensor, config: ControlNetConfig, vae: Callable[[], VAE], *, comfyui: bool = False
    ) -> None:
        """Nothing is done yet.

        Args:
            pixels: [B, 3, H, W] in [0, 1], of any size; what does not fit in shape is cut at the sides.
            config: of the net that it is for.
            vae: gives the VAE; asked where device work is done.
            comfyui: as `scaled`.
        """
        self._pixels, self._config, self._vae, self._comfyui = pixels, config, vae, comfyui
        self._made: dict[tuple[int, int], Tensor] = {}
        self._lock = Lock()

    def __call__(self, size: tuple[int, int]) -> Tensor:
        """[B, 16, h, w] float32 for latents of h and w."""
        with self._lock:
            if size not in self._made:
                height, width = (side * FACTOR for side in size)
                # Not smoothed, as ComfyUI has it: lines of one pixel stay lines.
                pixels = resize(self._pixels, width, height, "nearest-exact", crop="center")
                with torch.inference_mode():
                    self._made[size] = encode_hint(self._vae(), pixels, self._config, comfyui=self._comfyui)
            return self._made[size]
