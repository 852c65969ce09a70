"""Nodes that make pictures, or change their size, their frame or their number: [B, H, W, 3] in [0, 1]."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes.limits import check_size
from octavo.graph.spec import COMBO, FLOAT, INT, LINK, NodeSpec, node
from octavo.pipeline.resize import CROPS, IMAGE_METHODS, resize

SCALING = "image/upscaling"
MARGIN = INT(0, min=0, max=16384, step=8)
METHOD = COMBO(IMAGE_METHODS)


@node(
    "EmptyImage",
    category="image",
    description="A picture of one colour.",
    inputs={
        "width": INT(512, min=1, max=16384, step=1),
        "height": INT(512, min=1, max=16384, step=1),
        "batch_size": INT(1, min=1, max=4096),
        "color": INT(0, min=0, max=0xFFFFFF, step=1, display="color"),
    },
    outputs=("IMAGE",),
)
def empty_image(context: Context, width: int, height: int, batch_size: int, color: int) -> tuple[Tensor]:
    check_size(context, width, height, batch_size)
    rgb = torch.tensor([color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF]) / 255
    return (rgb.expand(batch_size, height, width, 3).contiguous(),)


# Size


@node(
    "ImageScale",
    display_name="Upscale Image",
    category=SCALING,
    description="Scale a picture to a size; a side of 0 follows from the other one.",
    inputs={
        "image": LINK("IMAGE"),
        "upscale_method": METHOD,
        "width": INT(512, min=0, max=16384, step=1),
        "height": INT(512, min=0, max=16384, step=1),
        "crop": COMBO(CROPS),
    },
    outputs=("IMAGE",),
    search_aliases=("resize image", "zoom"),
)
def image_scale(
    context: Context, image: Tensor, upscale_method: str, width: int, height: int, crop: str
) -> tuple[Tensor]:
    if not width and not height:
        return (image,)
    h, w = image.shape[1:3]
    width, height = width or max(1, round(w * height / h)), height or max(1, round(h * width / w))
    return (_scaled(context, image, upscale_method, width, height, crop),)


@node(
    "ImageScaleBy",
    display_name="Upscale Image By",
    category=SCALING,
    description="Scale a picture by a factor.",
    inputs={
        "image": LINK("IMAGE"),
        "upscale_method": METHOD,
        "scale_by": FLOAT(1.0, min=0.01, max=8.0, step=0.01),
    },
    outputs=("IMAGE",),
    search_aliases=("resize image",),
)
def image_scale_by(context: Context, image: Tensor, upscale_method: str, scale_by: float) -> tuple[Tensor]:
    height, width = (max(1, round(side * scale_by)) for side in image.shape[1:3])
    return (_scaled(context, image, upscale_method, width, height, "disabled"),)


@node(
    "ImageScaleToTotalPixels",
    category=SCALING,
    module="comfy_extras.nodes_post_processing",
    description="Scale a picture to so many pixels (a megapixel has 1024x1024), sides in whole resolution_steps.",
    inputs={
        "image": LINK("IMAGE"),
        "upscale_method": METHOD,
        "megapixels": FLOAT(1.0, min=0.01, max=16.0, step=0.01),
        "resolution_steps": INT(1, min=1, max=256, added_later=True),
    },
    outputs=("IMAGE",),
)
def image_scale_to_total_pixels(
    context: Context, image: Tensor, upscale_method: str, megapixels: float, resolution_steps: int
) -> tuple[Tensor]:
    h, w = image.shape[1:3]
    factor = math.sqrt(megapixels * 1024 * 1024 / (w * h))
    width, height = (max(1, round(side * factor / resolution_steps)) * resolution_steps for side in (w, h))
    return (_scaled(context, image, upscale_method, width, height, "disabled"),)


def _scaled(context: Context, image: Tensor, method: str, width: int, height: int, crop: str) -> Tensor:
    """Picture by picture, so that memory beside the result is needed for one at a time."""
    check_size(context, width, height, len(image))
    scaled = []
    for picture in image.chunk(len(image)):
        context.check()
        scaled.append(resize(picture.movedim(-1, 1), width, height, method, crop=crop).movedim(1, -1))
    return torch.cat(scaled)


# Frame


@node(
    "ImageCrop",
    display_name="Image Crop",
    category="image/transform",
    module="comfy_extras.nodes_images",
    description="Cut a rectangle out of a picture; what lies beyond its sides is left out.",
    inputs={
        "image": LINK("IMAGE"),
        "width": INT(512, min=1, max=16384, step=1),
        "height": INT(512, min=1, max=16384, step=1),
        "x": INT(0, min=0, max=16384, step=1),
        "y": INT(0, min=0, max=16384, step=1),
    },
    outputs=("IMAGE",),
    search_aliases=("trim",),
)
def image_crop(context: Context, image: Tensor, width: int, height: int, x: int, y: int) -> tuple[Tensor]:
    context.check()
    # As in ComfyUI, the last row or column is left of a place outside.
    left, top = min(x, image.shape[2] - 1), min(y, image.shape[1] - 1)
    return (image[:, top : top + height, left : left + width].clone(),)


@node(
    "ImagePadForOutpaint",
    display_name="Pad Image for Outpainting",
    category="image",
    description="Grey margins around a picture, and a mask of them that fades into it.",
    inputs={
        "image": LINK("IMAGE"),
        "left": MARGIN,
        "top": MARGIN,
        "right": MARGIN,
        "bottom": MARGIN,
        "feathering": INT(40, min=0, max=16384, step=1),
    },
    outputs=("IMAGE", "MASK"),
    search_aliases=("extend canvas", "expand image"),
)
def image_pad_for_outpaint(
    context: Context, image: Tensor, left: int, top: int, right: int, bottom: int, feathering: int
) -> tuple[Tensor, Tensor]:
    batch, height, width, _ = image.shape
    check_size(context, left + width + right, top + height + bottom, batch)
    margins = (left, right, top, bottom)
    padded = F.pad(image, (0, 0, *margins), value=0.5)
    fade = _fade(height, width, feathering, left=left > 0, top=top > 0, right=right > 0, bottom=bottom > 0)
    return padded, F.pad(fade, margins, value=1.0).unsqueeze(0)


def _fade(height: int, width: int, reach: int, *, left: bool, top: bool, right: bool, bottom: bool) -> Tensor:
    """How much of the old picture to draw anew: 1 beside a new margin, falling with the square to 0 at `reach` pixels.

    Nothing, as in ComfyUI, where two opposite margins would meet.
    """
    if not reach or reach * 2 >= min(height, width):
        return torch.zeros(height, width)
    rows, columns = torch.arange(height), torch.arange(width)
    away = torch.full((height, width), reach)
    for there, distance in (
        (top, rows[:, None]),
        (bottom, height - rows[:, None]),
        (left, columns[None]),
        (right, width - columns[None]),
    ):
        if there:
            away = torch.minimum(away, distance)
    return ((reach - away) / reach) ** 2


# Colour and number


@node(
    "ImageInvert",
    display_name="Invert Image",
    category="image",
    description="The negative of a picture.",
    inputs={"image": LINK("IMAGE")},
    outputs=("IMAGE",),
    search_aliases=("reverse colors",),
)
def image_invert(context: Context, image: Tensor) -> tuple[Tensor]:
    context.check()
    return (1 - image,)


@node(
    "ImageBatch",
    display_name="Batch Images",
    category="image",
    description="Both pictures in one batch; the second is scaled and cropped to the size of the first.",
    inputs={"image1": LINK("IMAGE"), "image2": LINK("IMAGE")},
    outputs=("IMAGE",),
    deprecated=True,
    search_aliases=("combine images", "stack images"),
)
def image_batch(context: Context, image1: Tensor, image2: Tensor) -> tuple[Tensor]:
    if image1.shape[-1] != image2.shape[-1]:
        raise RequestError(f"Pictures of {image1.shape[-1]} and {image2.shape[-1]} channels make no batch.")
    height, width = image1.shape[1:3]
    check_size(context, width, height, len(image1) + len(image2))
    return (torch.cat([image1, _scaled(context, image2, "bilinear", width, height, "center")]),)


NODES: tuple[NodeSpec, ...] = (
    empty_image,
    image_scale,
    image_scale_by,
    image_scale_to_total_pixels,
    image_crop,
    image_pad_for_outpaint,
    image_invert,
    image_batch,
)
