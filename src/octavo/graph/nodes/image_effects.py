"""Nodes that change the look of a picture, pixel by pixel or with their neighbours; and Canny's edges."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.spec import COMBO, FLOAT, INT, LINK, NodeSpec, node
from octavo.pipeline.edges import bell, canny, convolved
from octavo.pipeline.resize import resize

POST = "comfy_extras.nodes_post_processing"


@node(
    "ImageBlend",
    category="image/postprocessing",
    module=POST,
    description="Lay the second picture over the first.",
    inputs={
        "image1": LINK("IMAGE"),
        "image2": LINK("IMAGE"),
        "blend_factor": FLOAT(0.5, min=0.0, max=1.0, step=0.01),
        "blend_mode": COMBO(("normal", "multiply", "screen", "overlay", "soft_light", "difference")),
    },
    outputs=("IMAGE",),
)
def image_blend(
    context: Context, image1: Tensor, image2: Tensor, blend_factor: float, blend_mode: str
) -> tuple[Tensor]:
    context.check()
    return (blend(image1, image2, blend_factor, blend_mode),)


@node(
    "ImageBlur",
    category="image/postprocessing",
    module=POST,
    description="Gaussian blur. Sigma counts in radii, so at 1.0 the window ends where a normal curve is at 0.6.",
    inputs={
        "image": LINK("IMAGE"),
        "blur_radius": INT(1, min=1, max=31, step=1),
        "sigma": FLOAT(1.0, min=0.1, max=10.0, step=0.1),
    },
    outputs=("IMAGE",),
)
def image_blur(context: Context, image: Tensor, blur_radius: int, sigma: float) -> tuple[Tensor]:
    return (_one_by_one(context, image, lambda x: blur(x, blur_radius, sigma)),)


@node(
    "ImageSharpen",
    category="image/postprocessing",
    module=POST,
    description="Unsharp mask: add ten times alpha of what a blur takes away.",
    inputs={
        "image": LINK("IMAGE"),
        "sharpen_radius": INT(1, min=1, max=31, step=1),
        "sigma": FLOAT(1.0, min=0.1, max=10.0, step=0.01),
        "alpha": FLOAT(1.0, min=0.0, max=5.0, step=0.01),
    },
    outputs=("IMAGE",),
)
def image_sharpen(context: Context, image: Tensor, sharpen_radius: int, sigma: float, alpha: float) -> tuple[Tensor]:
    return (_one_by_one(context, image, lambda x: sharpen(x, sharpen_radius, sigma, alpha)),)


@node(
    "Canny",
    category="image/preprocessors",
    module="comfy_extras.nodes_canny",
    description="Edges in white on black, one pixel wide.",
    inputs={
        "image": LINK("IMAGE"),
        "low_threshold": FLOAT(0.4, min=0.01, max=0.99, step=0.01),
        "high_threshold": FLOAT(0.8, min=0.01, max=0.99, step=0.01),
    },
    outputs=("IMAGE",),
)
def canny_node(context: Context, image: Tensor, low_threshold: float, high_threshold: float) -> tuple[Tensor]:
    if low_threshold > high_threshold:
        raise RequestError(
            f"low_threshold={low_threshold} is above high_threshold={high_threshold}: exchange them. Edges above the "
            f"high one are kept, those above the low one only where they touch these."
        )
    edges = _one_by_one(context, image, lambda x: canny(x, low_threshold, high_threshold))
    return (edges.expand(-1, -1, -1, 3).contiguous(),)


def _one_by_one(context: Context, image: Tensor, effect: Callable[[Tensor], Tensor]) -> Tensor:
    """`effect` on each picture [1, C, H, W] of a batch [B, H, W, C], so that memory is needed for one at a time."""
    done = []
    for row in image.chunk(len(image)):
        context.check()
        done.append(effect(row.movedim(-1, 1)).movedim(1, -1))
    return torch.cat(done).contiguous()


# Blending


def _soft_light(a: Tensor, b: Tensor) -> Tensor:
    """W3C Compositing and Blending, 10.1.9 with `a` as backdrop and `b` as source."""
    light = torch.where(a <= 0.25, ((16 * a - 12) * a + 4) * a, a.clamp(min=0).sqrt())
    return torch.where(b <= 0.5, a - (1 - 2 * b) * a * (1 - a), a + (2 * b - 1) * (light - a))


MODES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normal": lambda _, b: b,
    "multiply": lambda a, b: a * b,
    "screen": lambda a, b: 1 - (1 - a) * (1 - b),
    "overlay": lambda a, b: torch.where(a <= 0.5, 2 * a * b, 1 - 2 * (1 - a) * (1 - b)),
    "soft_light": _soft_light,
    # Not the absolute value: where the second picture is brighter ComfyUI's node gives black.
    "difference": lambda a, b: a - b,
}


def blend(a: Tensor, b: Tensor, factor: float, mode: str) -> Tensor:
    """`a` with the part `factor` of it replaced by what `mode` makes of both.

    Args:
        a, b: [B, H, W, C] in [0, 1]; `b` is scaled and cropped to the size of `a`. A single one serves a whole batch.

    Returns:
        [B, H, W, C] in [0, 1], sides as of `a`.

    Raises:
        RequestError: batches of different lengths, neither of them 1.
    """
    if b.shape[1:3] != a.shape[1:3]:
        b = resize(b.movedim(-1, 1), a.shape[2], a.shape[1], "bicubic", crop="center").movedim(1, -1)
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise RequestError(
            f"ImageBlend got {len(a)} and {len(b)} pictures: give as many of the second as of the first, or one."
        )
    return (a * (1 - factor) + MODES[mode](a, b) * factor).clamp(0, 1)


# Blurring and sharpening


def blur(x: Tensor, radius: int, sigma: float) -> Tensor:
    """Gaussian blur with a window of 2·radius + 1 pixels; the picture is mirrored at its sides.

    Args:
        x: [B, C, H, W].
        sigma: width of the bell in units of the radius, as ComfyUI's nodes count it.

    Returns:
        Shape of `x`.

    Raises:
        RequestError: a picture not larger than the radius, which cannot be mirrored that far.
    """
    if min(x.shape[-2:]) <= radius:
        raise RequestError(
            f"A radius of {radius} needs pictures of at least {radius + 1} pixels each way, and this one has "
            f"{x.shape[-1]}x{x.shape[-2]}."
        )
    return convolved(x, bell(torch.linspace(-1, 1, 2 * radius + 1), sigma))


def sharpen(x: Tensor, radius: int, sigma: float, alpha: float) -> Tensor:
    """`x` plus 10·alpha times its difference from its blur, in [0, 1]; arguments as for `blur`."""
    return (x + 10 * alpha * (x - blur(x, radius, sigma))).clamp(0, 1)


NODES: tuple[NodeSpec, ...] = (image_blend, image_blur, image_sharpen, canny_node)
