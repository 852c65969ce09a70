"""Layers that the MMDiT and its ControlNets share: embeddings of patches, time and text, norms, modulation, MLP.

B batch, L tokens, D width, H heads, E = D/H.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256


def timestep_embedding(timestep: Tensor, width: int = FREQUENCIES, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of `timestep` at geometric frequencies.

    Args:
        timestep: [N] in 0..1000; fractions are welcome.
        width: length of the result, even.
        max_period: the longest period over 2π.

    Returns:
        [N, width] float32, whatever the dtype of `timestep`.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), as in Nichol & Dhariwal 2021 (arXiv 2102.09672).
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer-normalised `x` [B, L, D], then scaled by 1 + `scale` and moved by `shift`: [B, D], or [B, L, D] by token.

    Source: Peebles & Xie 2023 (arXiv 2212.09748), adaptive layer norm.
    """
    return modulate_normed(norm(x), shift, scale)


def norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis without weights, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate_normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`modulate` for an `x` that is normalised already, so that two modulations can share one norm."""
    return torch.addcmul(by_token(shift), x, 1 + by_token(scale))


def by_token(vectors: Tensor) -> Tensor:
    """Vectors of rows [B, D] beside tokens [B, L, D]: [B, 1, D]. Those of tokens are so already."""
    return vectors[:, None] if vectors.dim() == 2 else vectors


class MLPEmbedder(nn.Module):
    """Two linears with SiLU between: from frequencies or pooled text to the width of the conditioning vector."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out


class PatchEmbed(nn.Module):
    """Latents [B, C, h, w] → tokens [B, L, D], one a patch, row by row."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        out: Tensor = self.proj(latents)
        # In the order of the tokens: every residual keeps these strides, and norms would copy each time.
        return out.flatten(2).transpose(1, 2).contiguous()


class Embedding(nn.Embedding):
    """A table of vectors, left as it is on the meta device: drawing numbers there makes torch load its compiler."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis; Zhang & Sennrich 2019 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class MLP(nn.Module):
    """Linear to four times the width, GELU (tanh), linear back."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class AdaLNModulation(nn.Sequential):
    """SiLU and a linear: the conditioning vector [N, D] → `chunks` vectors [N, chunks, D]; keys as `.1.weight`."""

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, chunks * width))
        self.chunks = chunks

    def forward(self, vector: Tensor) -> Tensor:
        activate, linear = self
        out: Tensor = linear(activate(vector))
        return out.view(len(vector), self.chunks, -1)


def crop_pos_embed(table: Tensor, rows: int, columns: int) -> Tensor:
    """The centre of a square table of position embeddings.

    Args:
        table: [1, S·S, D].
        rows: patches down, at most S.
        columns: patches across, at most S.

    Returns:
        [1, rows · columns, D].
    """
    side = math.isqrt(table.shape[1])
    top, left = (side - rows) // 2, (side - columns) // 2
    square = table.view(1, side, side, -1)
    return square[:, top : top + rows, left : left + columns].flatten(1, 2)


def sincos_pos_embed(width: int, side: int, *, base_size: int) -> Tensor:
    """The table that SD3 models start training from: sines and cosines of column, then of row.

    Args:
        width: D, divisible by 4.
        side: S, patches along a side.
        base_size: side of the pictures, in patches, whose positions count in whole steps.

    Returns:
        [1, S·S, D] float32. The table is stored in checkpoints and read from there.

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929) in the two-dimensional form of He et al. 2022 (arXiv 2111.06377).
    """
    positions = torch.arange(side, dtype=torch.float64) / (side / base_size)
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = positions[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = axis[None, :, :].expand(side, side, -1)
    rows = axis[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width).float()
