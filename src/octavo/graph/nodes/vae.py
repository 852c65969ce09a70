"""Nodes that go from latents to pictures and back.

Latents on links are in the VAE's own numbers, so nothing is shifted or scaled here. Pictures of a batch go through the
VAE one after the other: each then comes out the same in whatever company, and others may use the device in between.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.devices import free_bytes, out_of_memory, whole_processor
from octavo.errors import NumericsError, OutOfMemoryError, RequestError
from octavo.fp8 import all_finite
from octavo.graph.context import Context
from octavo.graph.nodes.limits import check_drawn
from octavo.graph.nodes.types import Latent, given
from octavo.graph.spec import INT, LINK, Input, NodeSpec, node
from octavo.models import VAE, VAEConfig
from octavo.models.rows import decode_bytes
from octavo.pipeline.decode import OVERLAP, TILE, blend_tiles
from octavo.pipeline.shelf import Vae

LOAD_ONE = "load a VAE with VAELoader, or a checkpoint that has one, and connect it."


def _tile_inputs(step: int, what: str) -> dict[str, Input]:
    """Inputs of the tiled nodes. The temporal ones are for video alone: with pictures they mean nothing."""
    video = f"Frames to {what} at a time; for video only."
    return {
        "tile_size": INT(512, min=64, max=4096, step=step),
        "overlap": INT(64, min=0, max=4096, step=32, added_later=True),
        "temporal_size": INT(64, min=8, max=4096, step=4, added_later=True, tooltip=video),
        "temporal_overlap": INT(8, min=4, max=4096, step=4, added_later=True, tooltip=video),
    }


# Latents to pictures


@node(
    "VAEDecode",
    display_name="VAE Decode",
    category="latent",
    description="Latents become a picture; in tiles where memory is short.",
    inputs={"samples": LINK("LATENT", tooltip="What to decode."), "vae": LINK("VAE", tooltip="Decodes it.")},
    outputs=("IMAGE",),
    output_tooltips=("The picture.",),
    search_aliases=("decode", "latent to image"),
)
def vae_decode(context: Context, samples: Latent, vae: Vae | None) -> tuple[Tensor]:
    return (_decoded(context, samples, given(vae, "VAE", LOAD_ONE), _at_once_if_it_fits),)


@node(
    "VAEDecodeTiled",
    display_name="VAE Decode (Tiled)",
    category="_for_testing",
    description="Latents become a picture by overlapping tiles, which needs less memory.",
    inputs={"samples": LINK("LATENT"), "vae": LINK("VAE")} | _tile_inputs(32, "decode"),
    outputs=("IMAGE",),
)
def vae_decode_tiled(
    context: Context,
    samples: Latent,
    vae: Vae | None,
    tile_size: int,
    overlap: int,
    temporal_size: int,  # noqa: ARG001
    temporal_overlap: int,  # noqa: ARG001
) -> tuple[Tensor]:
    # As ComfyUI: where more than a quarter of a tile overlaps, the narrow tiles would be little else.
    overlap = min(overlap, tile_size // 4)

    def run(context: Context, vae: Vae, z: Tensor) -> Tensor:
        factor = _config(vae).factor
        return _decode_tiles(context, vae, z, tile_size // factor, overlap // factor)

    return (_decoded(context, samples, given(vae, "VAE", LOAD_ONE), run),)


def _decoded(context: Context, samples: Latent, vae: Vae, run: Callable[[Context, Vae, Tensor], Tensor]) -> Tensor:
    """Pictures [B, 8h, 8w, 3] in [0, 1] of latents, each by `run`: [1, 16, h, w] → [1, 3, 8h, 8w] in [-1, 1]."""
    z = samples["samples"]
    channels, factor = _config(vae).latent_channels, _config(vae).factor
    if z.ndim != 4 or z.shape[1] != channels or not z.numel():
        raise RequestError(
            f"'{vae.name}' decodes latents of {channels} channels, and these are {list(z.shape)}: start from "
            f"EmptySD3LatentImage, and decode what a sampler made of it."
        )
    check_drawn(context, z.shape[3] * factor, z.shape[2] * factor, len(z))
    pictures = []
    for row in z.chunk(len(z)):
        context.check()
        pixels = run(context, vae, row).clamp(-1, 1)
        if not all_finite(pixels):
            raise NumericsError(
                f"'{vae.name}' gave NaN or infinity. In float16 the VAE can overflow: run with --dtype bfloat16 or "
                f"float32."
            )
        pictures.append((pixels + 1) / 2)
    return torch.cat(pictures).movedim(1, -1).contiguous()


def _at_once_if_it_fits(context: Context, vae: Vae, z: Tensor) -> Tensor:
    if not _wants_tiles(context, vae, z):
        try:
            return _on_device(context, vae, z, VAE.decode)
        except (OutOfMemoryError, MemoryError, RuntimeError) as error:
            # Tiles need a fraction of the memory.
            if not (isinstance(error, OutOfMemoryError) or out_of_memory(error)):
                raise
    return _decode_tiles(context, vae, z, TILE, OVERLAP)


def _decode_tiles(context: Context, vae: Vae, z: Tensor, tile: int, overlap: int) -> Tensor:
    return _tiled(context, vae, z, VAE.decode, tile=tile, overlap=overlap, factor=_config(vae).factor)


def _wants_tiles(context: Context, vae: Vae, z: Tensor) -> bool:
    """Whether to decode in tiles: as the models were loaded to be used, else if the whole would not fit."""
    if context.shelf.settings.tiled_vae is not None:
        return context.shelf.settings.tiled_vae
    free = free_bytes(vae.part.device)
    config, (height, width) = _config(vae), z.shape[2:]
    sides = (height * config.factor, width * config.factor)
    return free is not None and decode_bytes(config, *sides, vae.part.dtype, vae.part.device) > free


# Pictures to latents


@node(
    "VAEEncode",
    display_name="VAE Encode",
    category="latent",
    description="A picture becomes latents. Sides that eight does not divide lose up to seven pixels.",
    inputs={"pixels": LINK("IMAGE"), "vae": LINK("VAE")},
    outputs=("LATENT",),
    search_aliases=("encode", "image to latent"),
)
def vae_encode(context: Context, pixels: Tensor, vae: Vae | None) -> tuple[Latent]:
    return ({"samples": _encoded(context, pixels, given(vae, "VAE", LOAD_ONE))},)


@node(
    "VAEEncodeTiled",
    display_name="VAE Encode (Tiled)",
    category="_for_testing",
    description="A picture becomes latents by overlapping tiles, which needs less memory.",
    inputs={"pixels": LINK("IMAGE"), "vae": LINK("VAE")} | _tile_inputs(64, "encode"),
    outputs=("LATENT",),
)
def vae_encode_tiled(
    context: Context,
    pixels: Tensor,
    vae: Vae | None,
    tile_size: int,
    overlap: int,
    temporal_size: int,  # noqa: ARG001
    temporal_overlap: int,  # noqa: ARG001
) -> tuple[Latent]:
    encoder = given(vae, "VAE", LOAD_ONE)
    factor = _config(encoder).factor
    return ({"samples": _encoded(context, pixels, encoder, tile=tile_size // factor, overlap=overlap // factor)},)


@node(
    "VAEEncodeForInpaint",
    display_name="VAE Encode (for Inpainting)",
    category="latent/inpaint",
    description="A picture becomes latents, grey where the mask is; the mask, grown by some pixels, goes with them.",
    inputs={
        "pixels": LINK("IMAGE"),
        "vae": LINK("VAE"),
        "mask": LINK("MASK"),
        "grow_mask_by": INT(6, min=0, max=64, step=1),
    },
    outputs=("LATENT",),
)
def vae_encode_for_inpaint(
    context: Context, pixels: Tensor, vae: Vae | None, mask: Tensor, grow_mask_by: int
) -> tuple[Latent]:
    encoder = given(vae, "VAE", LOAD_ONE)
    _check_pixels(context, pixels, encoder)
    fitted = F.interpolate(_planes(mask), size=pixels.shape[1:3], mode="bilinear")
    factor = _config(encoder).factor
    hole = _cropped(fitted, factor).round()
    if len(hole) not in (1, len(pixels)):
        raise RequestError(f"{len(hole)} masks do not fit {len(pixels)} pictures: give one, or as many.")
    shown = _cropped(pixels[..., :3].movedim(-1, 1), factor)
    # Grey where something new is drawn, so that nothing of the old shows through.
    emptied = ((shown - 0.5) * (1 - hole) + 0.5).movedim(1, -1)
    return ({"samples": _encoded(context, emptied, encoder), "noise_mask": _grown(hole, grow_mask_by)},)


@node(
    "SetLatentNoiseMask",
    display_name="Set Latent Noise Mask",
    category="latent/inpaint",
    description="Draw anew only where the mask is.",
    inputs={"samples": LINK("LATENT"), "mask": LINK("MASK")},
    outputs=("LATENT",),
)
def set_latent_noise_mask(context: Context, samples: Latent, mask: Tensor) -> tuple[Latent]:
    context.check()
    return (cast(Latent, {**samples, "noise_mask": _planes(mask)}),)


def _encoded(context: Context, pixels: Tensor, vae: Vae, *, tile: int | None = None, overlap: int = 0) -> Tensor:
    """Latents [B, 16, h, w] of pictures [B, H, W, C] in [0, 1]: the mean of the VAE's distribution, nothing drawn.

    Args:
        tile, overlap: in latent pixels; None encodes in one piece.
    """
    _check_pixels(context, pixels, vae)
    factor = _config(vae).factor
    latents = []
    for picture in pixels.chunk(len(pixels)):
        context.check()
        x = _cropped(picture[..., :3].movedim(-1, 1), factor) * 2 - 1
        if tile is None:
            latents.append(_on_device(context, vae, x, _mean))
            continue
        # With the pixels of each latent pixel as its channels, tiles are cut and joined on one grid.
        stacked = F.pixel_unshuffle(x, factor)
        latents.append(_tiled(context, vae, stacked, _mean_of_stacked, tile=tile, overlap=overlap, factor=1))
    z = torch.cat(latents)
    if not all_finite(z):
        raise NumericsError(
            f"'{vae.name}' gave NaN or infinity: the picture holds such values, or the VAE overflows in float16. Run "
            f"with --dtype bfloat16 or float32."
        )
    return z


def _mean(model: VAE, pixels: Tensor) -> Tensor:
    return model.encode(pixels).chunk(2, dim=1)[0]


def _mean_of_stacked(model: VAE, stacked: Tensor) -> Tensor:
    return _mean(model, F.pixel_shuffle(stacked, model.config.factor))


def _check_pixels(context: Context, pixels: Tensor, vae: Vae) -> None:
    batch, height, width = pixels.shape[:3]
    factor = _config(vae).factor
    if min(height, width) < factor:
        raise RequestError(f"A picture of {width}x{height} is too small to be encoded: {factor}x{factor} is the least.")
    check_drawn(context, width, height, batch)


def _cropped(x: Tensor, factor: int) -> Tensor:
    """The middle of `x` [B, C, H, W] whose sides `factor` divides."""
    height, width = x.shape[-2:]
    top, left = height % factor // 2, width % factor // 2
    return x[..., top : top + height // factor * factor, left : left + width // factor * factor]


def _planes(mask: Tensor) -> Tensor:
    """A mask [B, H, W] as [B, 1, H, W]."""
    if mask.ndim < 2 or not mask.numel():
        raise RequestError(f"A mask [batch, height, width] is needed, and this one is {list(mask.shape)}.")
    return mask.reshape(-1, 1, *mask.shape[-2:])


def _grown(hole: Tensor, pixels: int) -> Tensor:
    """A mask of zeros and ones, larger by a square of so many pixels."""
    if not pixels:
        return hole
    # A square with even sides has no middle; the mask then grows one pixel further to the right and downwards.
    before, after = pixels // 2, (pixels - 1) // 2
    padded = F.pad(hole, (before, after, before, after))
    return F.max_pool2d(F.max_pool2d(padded, (1, pixels), stride=1), (pixels, 1), stride=1)


# The device


def _config(vae: Vae) -> VAEConfig:
    return cast(VAEConfig, vae.part.config)


def _on_device(context: Context, vae: Vae, x: Tensor, step: Callable[[VAE, Tensor], Tensor]) -> Tensor:
    """`step` of the VAE on `x`, in its dtype and on its device; the result in float32 on the CPU."""

    @torch.inference_mode()
    @whole_processor()
    def work() -> Tensor:
        return step(vae.part(), x.to(vae.part.device, vae.part.dtype)).float().cpu()

    return cast(Tensor, context.on_device(work))


def _tiled(
    context: Context,
    vae: Vae,
    x: Tensor,
    step: Callable[[VAE, Tensor], Tensor],
    *,
    tile: int,
    overlap: int,
    factor: int,
) -> Tensor:
    """The mean of three tilings, whose seams lie in different places: square tiles, flat ones and tall ones.

    Args:
        x: [B, C, h, w].
        tile, overlap: in pixels of `x`; flat and tall tiles have the same area as square ones.
        factor: how much larger the result is.

    Raises:
        RequestError: tiles that are all overlap.
    """
    if overlap >= tile // 2 and max(x.shape[-2:]) > tile // 2:
        raise RequestError(
            f"An overlap of {overlap} in tiles of {tile} latent pixels leaves nothing of the narrow ones: choose an "
            f"overlap below half of tile_size."
        )

    def run(part: Tensor) -> Tensor:
        context.check()
        return _on_device(context, vae, part, step)

    shapes = ((tile, tile), (2 * tile, tile // 2), (tile // 2, 2 * tile))
    return sum((blend_tiles(run, x, tile=s, overlap=overlap, factor=factor) for s in shapes), torch.zeros(())) / 3


NODES: tuple[NodeSpec, ...] = (
    vae_decode,
    vae_decode_tiled,
    vae_encode,
    vae_encode_tiled,
    vae_encode_for_inpaint,
    set_latent_noise_mask,
)
