"""Nodes for masks: [B, H, W] in [0, 1], where 1 is what to draw anew or to use."""

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes.limits import check_size
from octavo.graph.spec import BOOLEAN, COMBO, FLOAT, INT, LINK, NodeSpec, node

MODULE = "comfy_extras.nodes_mask"
CHANNELS = ("red", "green", "blue", "alpha")


@node(
    "SolidMask",
    category="mask",
    module=MODULE,
    description="A mask of one value.",
    inputs={
        "value": FLOAT(1.0, min=0.0, max=1.0, step=0.01),
        "width": INT(512, min=1, max=16384, step=1),
        "height": INT(512, min=1, max=16384, step=1),
    },
    outputs=("MASK",),
)
def solid_mask(context: Context, value: float, width: int, height: int) -> tuple[Tensor]:
    check_size(context, width, height)
    return (torch.full((1, height, width), value),)


@node(
    "InvertMask",
    category="mask",
    module=MODULE,
    description="1 becomes 0, and 0 becomes 1.",
    inputs={"mask": LINK("MASK")},
    outputs=("MASK",),
    search_aliases=("reverse mask",),
)
def invert_mask(context: Context, mask: Tensor) -> tuple[Tensor]:
    context.check()
    return (1 - mask,)


@node(
    "GrowMask",
    display_name="Grow Mask",
    category="mask",
    module=MODULE,
    description="Make the bright parts of a mask larger by so many pixels, or smaller where expand is negative.",
    inputs={
        "mask": LINK("MASK"),
        "expand": INT(0, min=-16384, max=16384, step=1),
        "tapered_corners": BOOLEAN(True),
    },
    outputs=("MASK",),
    search_aliases=("expand mask", "shrink mask"),
)
def grow_mask(context: Context, mask: Tensor, expand: int, tapered_corners: bool) -> tuple[Tensor]:
    grown = mask if expand > 0 else -mask
    for _ in range(abs(expand)):
        context.check()
        once = _grown(grown, tapered_corners)
        if torch.equal(once, grown):  # nothing left to grow into
            break
        grown = once
    return (grown if expand > 0 else -grown,)


def _grown(mask: Tensor, tapered: bool) -> Tensor:
    """Each pixel becomes the largest of itself and its neighbours: all eight, or without the corners."""
    x = mask.unsqueeze(1)
    if tapered:
        down, across = (F.max_pool2d(x, size, 1, pad) for size, pad in (((3, 1), (1, 0)), ((1, 3), (0, 1))))
        return torch.maximum(down, across).squeeze(1)
    return F.max_pool2d(x, 3, 1, 1).squeeze(1)


@node(
    "MaskToImage",
    display_name="Convert Mask to Image",
    category="mask",
    module=MODULE,
    description="The mask in grey.",
    inputs={"mask": LINK("MASK")},
    outputs=("IMAGE",),
)
def mask_to_image(context: Context, mask: Tensor) -> tuple[Tensor]:
    context.check()
    return (mask.reshape(-1, *mask.shape[-2:]).unsqueeze(-1).expand(-1, -1, -1, 3).contiguous(),)


@node(
    "ImageToMask",
    display_name="Convert Image to Mask",
    category="mask",
    module=MODULE,
    description="One channel of a picture.",
    inputs={"image": LINK("IMAGE"), "channel": COMBO(CHANNELS)},
    outputs=("MASK",),
    search_aliases=("extract channel",),
)
def image_to_mask(context: Context, image: Tensor, channel: str) -> tuple[Tensor]:
    context.check()
    index = CHANNELS.index(channel)
    if index >= image.shape[-1]:
        raise RequestError(
            "This picture has no alpha channel: pictures on links are red, green and blue. LoadImage gives the alpha "
            "of a file as its second output, MASK."
        )
    return (image[..., index].clone(),)


NODES: tuple[NodeSpec, ...] = (solid_mask, invert_mask, grow_mask, mask_to_image, image_to_mask)
