"""A second, larger pass over a picture, which people call "hires fix": what may be asked of it, checked once.

The picture is drawn at a size that the model knows, made larger, and drawn again from there, so that what it shows is
settled small and its details come out at the full size. It is enlarged as latents, which costs nothing and blurs, or as
the pixels that they stand for, which keeps edges. `generate` has the two passes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo.errors import RequestError, did_you_mean
from octavo.models.vae import from_latents, to_latents
from octavo.pipeline.bounds import check_number, check_side, nearest_side
from octavo.pipeline.latents import FACTOR
from octavo.pipeline.resize import IMAGE_METHODS, LATENT_METHODS, resize
from octavo.text.lora_tags import split_tags

if TYPE_CHECKING:
    from octavo.pipeline.request import Lora

OF_LATENTS = "latent-"
METHODS = (*IMAGE_METHODS, *(OF_LATENTS + method for method in LATENT_METHODS))  # of pixels, and of latents
SCALE = 2.0  # where no size is asked for
MOST_SCALE = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hires:
    """The second pass. `None` asks for what the first one has."""

    scale: float | None = None  # of both sides, to the nearest multiples of 16; 2 where no size is given either
    width: int | None = None  # or pixels; a side that is not given follows from the other
    height: int | None = None
    method: str = "lanczos"  # one of `METHODS`
    denoise: float = 0.5  # share of the schedule that is run; the smaller, the closer to the first pass
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    prompt: str | None = None  # the LoRAs that it asks for take the place of those that the first prompt asks for
    negative_prompt: str | None = None
    loras: "tuple[Lora, ...] | None" = None  # beside those

    def __post_init__(self) -> None:
        check_number("scale of hires", self.scale, 1, MOST_SCALE)
        for side in ("width", "height"):
            check_side(f"{side} of hires", getattr(self, side))
        if self.scale is not None and (self.width, self.height) != (None, None):
            raise RequestError("Hires is given a factor and a size: leave one of them out.")
        if self.method not in METHODS:
            raise RequestError(
                f"There is no way '{self.method!s:.60}' to enlarge. Use {', '.join(METHODS)}; upscaling models are not "
                f"read.{did_you_mean(str(self.method), METHODS)}"
            )
        check_number("denoise of hires", self.denoise, 0, 1)
        check_number("steps of hires", self.steps, 1, 1000)
        check_number("guidance_scale of hires", self.guidance_scale, 0, 100)
        if self.prompt is not None and not self.prompt.strip():
            raise RequestError("The prompt of hires is empty; leave it out for that of the first pass.")
        if self.negative_prompt is not None and split_tags(self.negative_prompt)[1]:
            raise RequestError("A LoRA acts on the whole picture: ask for it in the prompt, not in the negative one.")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels of what is made of a picture of this size.

        Raises:
            RequestError: it would be smaller.
        """
        if self.width is None and self.height is None:
            scale = SCALE if self.scale is None else self.scale
            return nearest_side(width * scale), nearest_side(height * scale)
        across = self.width or nearest_side(width * (self.height or height) / height)
        down = self.height or nearest_side(height * across / width)
        if across < width or down < height:
            raise RequestError(
                f"Hires makes a picture larger, and {across}x{down} has a side that is smaller than those of "
                f"{width}x{height}, which is drawn first: ask for a larger size, or for a smaller first one (--size)."
            )
        return across, down

    @property
    def of_latents(self) -> bool:
        """Whether it is latents that are made larger, and not pixels."""
        return self.method.startswith(OF_LATENTS)

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data for JSON, without what was not asked."""
        plain = {name: value for name in self.__dataclass_fields__ if (value := getattr(self, name)) is not None}
        if self.loras is not None:
            plain["loras"] = [lora.settings for lora in self.loras]
        return plain


def enlarged(x: Tensor, hires: Hires, width: int, height: int) -> Tensor:
    """Latents [1, 16, h, w] of the first pass, or its pixels [1, 3, H, W] in [-1, 1], as large as the second.

    Computed on the CPU in float32 and, latents, in the VAE's own numbers, as ComfyUI's nodes do. Where the proportions
    differ, what does not fit is cut off at two sides, as AUTOMATIC1111 does; nothing is stretched.

    Args:
        width, height: in pixels of the picture.

    Returns:
        Like `x`, on its device; pixels that a method overshoots may leave [-1, 1].
    """
    with torch.inference_mode():
        if hires.of_latents:
            method = hires.method.removeprefix(OF_LATENTS)
            plain = from_latents(x.cpu().float())
            return to_latents(resize(plain, width // FACTOR, height // FACTOR, method, crop="center")).to(x)
        shown = _channels_last((x.cpu().float() + 1) / 2)
        return (_channels_last(resize(shown, width, height, hires.method, crop="center")) * 2 - 1).to(x)


def _channels_last(pixels: Tensor) -> Tensor:
    """The same with its channels side by side in memory, as nodes have them: a convolution's last bits hang on it."""
    return pixels.contiguous(memory_format=torch.channels_last)
