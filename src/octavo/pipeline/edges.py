"""Edges of pictures, as ControlNets of the Canny kind follow them; the Canny node and `--control canny:` call this.

Plain torch: nothing need be installed for it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import RequestError

GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue in brightness; ITU-R BT.601
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
# The eight neighbours as (row, column), turning from the right downwards, by 45 degrees each.
NEIGHBOURS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))


def canny(x: Tensor, low: float, high: float) -> Tensor:
    """Edges of pictures: Canny 1986, in the numbers of kornia's `canny`, which ComfyUI's node calls.

    Brightness is blurred (5x5 pixels, sigma 1); its gradient is taken with Sobel's kernels, without dividing by their
    weight, so that a step from black to white has a magnitude of about 3; what is not largest along the gradient is
    dropped; what is above `high` is an edge, and so is what is above `low` and touches one.

    Args:
        x: [B, C, H, W] in [0, 1]; three channels, or one of brightness.
        low, high: thresholds of the magnitude.

    Returns:
        [B, 1, H, W] of zeros and ones.

    Raises:
        RequestError: pictures of less than 3 pixels each way.
    """
    if min(x.shape[-2:]) < 3:
        raise RequestError(f"Canny needs pictures of at least 3x3 pixels, not {x.shape[-1]}x{x.shape[-2]}.")
    if x.shape[1] >= 3:
        x = (x[:, :3] * torch.tensor(GREY, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    smooth = F.pad(convolved(x, bell(torch.arange(-2.0, 3.0), 1.0)), (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor(SOBEL, dtype=x.dtype, device=x.device)
    across, down = F.conv2d(smooth, kernel[None, None]), F.conv2d(smooth, kernel.T[None, None])
    magnitude = (across**2 + down**2 + 1e-6).sqrt()

    # Of the two neighbours that the gradient points to and from, both must be smaller.
    direction = (torch.atan2(down, across) * (4 / math.pi)).round().long() % 8
    falls = torch.cat([magnitude - near for near in _neighbours(magnitude)], dim=1)
    ridge = torch.minimum(falls.gather(1, direction), falls.gather(1, (direction + 4) % 8)) > 0

    weak, strong = ridge & (magnitude > low), ridge & (magnitude > high)
    return _grown(strong, weak).to(x.dtype)


def _grown(strong: Tensor, weak: Tensor) -> Tensor:
    """`strong` and all of `weak` that is connected to it, in any of the eight directions."""
    while True:
        touching = F.max_pool2d(strong.float(), 3, stride=1, padding=1) > 0
        grown = strong | (touching & weak)
        if torch.equal(grown, strong):
            return grown
        strong = grown


def _neighbours(x: Tensor) -> list[Tensor]:
    """For each direction the neighbour that lies there, 0 beyond the sides."""
    padded = F.pad(x, (1, 1, 1, 1))
    height, width = x.shape[-2:]
    return [padded[..., 1 + row : 1 + row + height, 1 + column : 1 + column + width] for row, column in NEIGHBOURS]


def bell(places: Tensor, sigma: float) -> Tensor:
    """The normal curve at `places`, summing to 1."""
    weights = (-(places**2) / (2 * sigma**2)).exp()
    return weights / weights.sum()


def convolved(x: Tensor, weights: Tensor) -> Tensor:
    """`x` [B, C, H, W] convolved with `weights` along the rows and along the columns, mirrored at its sides."""
    planes = x.flatten(0, 1).unsqueeze(1)
    radius = len(weights) // 2
    padded = F.pad(planes, (radius,) * 4, mode="reflect")
    kernel = weights.to(x)
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).view(x.shape)
