"""The autoencoder of SD3: pixels to 16-channel latents an eighth as wide and high, and back.

Only the mathematics, in the key layout of the single files (`encoder.down.0.block.0.conv1.weight` …). What is said here
is the definition; large pictures go through it by rows (`rows`). Tiling is `pipeline.decode`'s business, reading files
`checkpoint`'s.

Sources: Rombach et al. 2022 (arXiv 2112.10752); Esser et al. 2024 (arXiv 2403.03206) for 16 channels, shift and scale.

B batch, C channels, H and W pixels, h = H/8 and w = W/8 latent pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.models import rows
from octavo.models.attention import attention

SHIFT, SCALE = 0.0609, 1.5305


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """Shape of a VAE; the defaults are those of every released SD3 and SD3.5 model."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # by level, from pixels to latents
    layers_per_block: int = 2  # residual blocks a level in the encoder; the decoder has one more
    latent_channels: int = 16
    groups: int = 32  # of every group norm

    @property
    def factor(self) -> int:
        """Pixels a latent pixel covers, along one side."""
        return int(2 ** (len(self.channels) - 1))


def to_latents(z: Tensor) -> Tensor:
    """What the VAE encodes to → what the MMDiT works on: (z - 0.0609) · 1.5305."""
    return (z - SHIFT) * SCALE


def from_latents(latents: Tensor) -> Tensor:
    """Inverse of `to_latents`."""
    return latents / SCALE + SHIFT


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after group norm and SiLU, beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return torch.add(self.nin_shortcut(x), h)


class AttnBlock(nn.Module):
    """Self-attention over all pixels with one head as wide as the channels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(2) for conv in (self.q, self.k, self.v))
        out = attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return torch.add(x, self.proj_out(out))


class Downsample(nn.Module):
    """Halve both sides; padded only on the right and below, as the released weights expect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Double both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Mid(nn.Module):
    """Residual, attention, residual: the lowest resolution of both halves."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Level(nn.Module):
    """Residual blocks at one resolution, then perhaps a change of resolution."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(channels_in if i == 0 else channels_out, channels_out, groups) for i in range(blocks)
        )
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        out: Tensor = self.upsample(self.downsample(x))
        return out


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] → mean and log-variance [B, 2·16, h, w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(channels):
            level = Level(channels[max(i - 1, 0)], width, config.layers_per_block, groups)
            if i < len(channels) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Mid(channels[-1], groups)
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    """Latents [B, 16, h, w], as encoded (not as the MMDiT sees them) → pixels [B, 3, H, W] near [-1, 1]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = Mid(channels[-1], groups)
        # `up.0` is the level nearest the pixels, so the list runs against the order of work.
        self.up = nn.ModuleList()
        for i, width in enumerate(channels):
            level = Level(channels[min(i + 1, len(channels) - 1)], width, config.layers_per_block + 1, groups)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class VAE(nn.Module):
    """Encoder and decoder of one file."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1], sides divisible by 8 → moments [B, 32, h, w]: mean, then log-variance."""
        by_rows = self._by_rows(pixels, 1)
        moments: Tensor = rows.encode(self.encoder, pixels) if by_rows else self.encoder(_laid_out(pixels)).contiguous()
        return moments

    def decode(self, z: Tensor) -> Tensor:
        """Encoded latents [B, 16, h, w] → pixels [B, 3, H, W] near [-1, 1], not clamped."""
        by_rows = self._by_rows(z, self.config.factor)
        pixels: Tensor = rows.decode(self.decoder, z) if by_rows else self.decoder(_laid_out(z)).contiguous()
        return pixels

    def _by_rows(self, x: Tensor, factor: int) -> bool:
        """By rows unless a picture is small, or gradients are to flow back: what rows overwrite they would need."""
        if torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in self.parameters())):
            return False
        return rows.by_rows(self.config, x.shape[-2] * factor, x.shape[-1] * factor)


def _laid_out(x: Tensor) -> Tensor:
    """[B, C, H, W] as its convolutions like it, and all that follow: on a CPU with channels last, a tenth faster."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x
