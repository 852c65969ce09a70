"""Pictures and latents in another size, by the methods that ComfyUI's nodes name.

All of them take and give [B, C, H, W]; `nearest-exact`, `bilinear`, `bicubic` and `area` are torch's, without
antialiasing. None changes anything at the same size, and all keep a constant as it is.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

IMAGE_METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")
LATENT_METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "bislerp")
CROPS = ("disabled", "center")


def resize(x: Tensor, width: int, height: int, method: str, *, crop: str = "disabled") -> Tensor:
    """`x` with sides `width` and `height`.

    Args:
        x: [B, C, H, W].
        method: one of `IMAGE_METHODS` (for values in [0, 1]) or `LATENT_METHODS`.
        crop: "center" first cuts away what is too much of the longer side, so that nothing is stretched.

    Returns:
        [B, C, height, width], as precise as `x`.
    """
    if crop == "center":
        x = _middle(x, width / height)
    if x.shape[-2:] == (height, width):
        return x
    if method == "lanczos":
        return lanczos(x, width, height)
    if method == "bislerp":
        return bislerp(x, width, height)
    return F.interpolate(x, size=(height, width), mode=method)


def _middle(x: Tensor, aspect: float) -> Tensor:
    """The middle of `x` whose width is `aspect` times its height, to the nearest pixel on each side."""
    height, width = x.shape[-2:]
    left, top = 0, 0
    if width / height > aspect:
        left = round((width - height * aspect) / 2)
    else:
        top = round((height - width / aspect) / 2)
    # A sliver thinner than a pixel would be left where the shapes are very unlike.
    left, top = min(left, (width - 1) // 2), min(top, (height - 1) // 2)
    return x[..., top : height - top, left : width - left]


def lanczos(x: Tensor, width: int, height: int) -> Tensor:
    """Windowed sinc over three lobes, widened when shrinking, as Pillow does it; values stay in [0, 1].

    ComfyUI does it on 8-bit pixels, which Pillow rounds and clips after either direction. This clips likewise, but
    keeps the fractions of a level.
    """
    planes = x.flatten(0, 1).float().cpu().numpy()
    out = np.empty((len(planes), height, width), np.float32)
    # Rows first, but a direction that shrinks comes before one that grows.
    columns_first = width > x.shape[-1] and height < x.shape[-2]
    between = (x.shape[-1], height) if columns_first else (width, x.shape[-2])
    for plane, target in zip(planes, out, strict=True):
        target[:] = _filtered(_filtered(plane, between), (width, height))
    return torch.from_numpy(out).view(*x.shape[:2], height, width).to(x)


def _filtered(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One plane of floats through Pillow's Lanczos, without what it overshoots."""
    image = Image.fromarray(np.ascontiguousarray(plane)).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image).clip(0, 1)


def bislerp(x: Tensor, width: int, height: int) -> Tensor:
    """Between neighbouring pixels, turn from one vector of channels to the other, and blend their lengths linearly.

    A linear blend shortens vectors that point apart, which greys latents; this keeps their length. Positions are those
    of bilinear interpolation; first along the rows, then along the columns.
    """
    return _slerp_along(_slerp_along(x, -1, width), -2, height)


def _slerp_along(x: Tensor, dim: int, length: int) -> Tensor:
    size = x.shape[dim]
    if size == length:
        return x
    place = ((torch.arange(length, dtype=torch.float64, device=x.device) + 0.5) * size / length - 0.5).clamp(
        0, size - 1
    )
    first = place.floor().long()
    second = (first + 1).clamp(max=size - 1)
    ratio = (place - first).to(torch.float32)
    ratio = ratio if dim == -1 else ratio[:, None]
    return _slerp(x.index_select(dim, first).float(), x.index_select(dim, second).float(), ratio).to(x.dtype)


def _slerp(a: Tensor, b: Tensor, ratio: Tensor) -> Tensor:
    """Spherical interpolation over channels (dimension 1); Shoemake 1985.

    Where `a` and `b` point the same way there is nothing to turn; where they point exactly apart, or one is zero, there
    is no one way to turn, so they are blended linearly.
    """
    length_a, length_b = (v.norm(dim=1, keepdim=True) for v in (a, b))
    unit_a, unit_b = a / length_a.clamp(min=1e-30), b / length_b.clamp(min=1e-30)
    dot = (unit_a * unit_b).sum(dim=1, keepdim=True)
    angle = dot.clamp(-1, 1).acos()
    turned = (((1 - ratio) * angle).sin() * unit_a + (ratio * angle).sin() * unit_b) / angle.sin().clamp(min=1e-30)
    turned = turned * (length_a * (1 - ratio) + length_b * ratio)
    straight = a * (1 - ratio) + b * ratio
    return torch.where((dot.abs() > 1 - 1e-5) | (length_a == 0) | (length_b == 0), straight, turned)
