"""The multimodal diffusion transformer of SD3 and SD3.5: noisy latents and text in, velocity out.

Only the mathematics, in the key layout of the single files. The model is split at its natural seam: `modulation` maps
time and pooled text to every block's shift, scale and gate (a third of all weights, which never see a token), `forward`
is the rest. All sigmas of a run are known before its first step, so one call of `modulation` serves the whole run.
Both are made of smaller steps (`vector` and each block's table; `embed`, the blocks and `finish`), for those who hold
one block at a time.

Sources: Esser et al. 2024 (arXiv 2403.03206); for the second attention of SD3.5 Medium and qk-norm, Stability AI's
`sd3.5` repository.

B batch, N rows of modulation, L text tokens, n image tokens, D width, H heads, h and w latent pixels.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.models.attention import attention
from octavo.models.layers import (
    FREQUENCIES,
    MLP,
    AdaLNModulation,
    MLPEmbedder,
    PatchEmbed,
    RMSNorm,
    crop_pos_embed,
    modulate,
    modulate_normed,
    norm,
    timestep_embedding,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MMDiTConfig:
    """Shape of an MMDiT; read from a checkpoint by `checkpoint.detect`."""

    depth: int  # joint blocks
    width: int
    heads: int
    dual_attention: tuple[int, ...] = ()  # blocks whose image stream has a second attention
    qk_norm: bool = True
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    context_width: int = 4096
    pooled_width: int = 2048
    pos_embed_size: int = 192  # side of the table of positions, in patches
    mlp_ratio: int = 4  # of the width

    @classmethod
    def large(cls) -> "MMDiTConfig":
        """SD3.5 Large and Large Turbo: 8.1 billion weights."""
        return cls(depth=38, width=2432, heads=38)

    @classmethod
    def medium(cls) -> "MMDiTConfig":
        """SD3.5 Medium: 2.5 billion weights."""
        return cls(depth=24, width=1536, heads=24, dual_attention=tuple(range(13)), pos_embed_size=384)

    @classmethod
    def sd3_medium(cls) -> "MMDiTConfig":
        """SD3 Medium: 2.0 billion weights, no qk-norm."""
        return cls(depth=24, width=1536, heads=24, qk_norm=False)


@dataclass(frozen=True, slots=True)
class Modulation:
    """Shift, scale and gate vectors of every block for N rows (a row: one sigma of one prompt)."""

    image: tuple[Tensor, ...]  # by block [N, 6 or 9, D]
    context: tuple[Tensor, ...]  # by block [N, 6, D]; the last [N, 2, D]
    final: Tensor  # [N, 2, D]

    def each(self) -> list["Modulation"]:
        """Every row by itself."""
        ones = [1] * len(self.final)
        cut = [tensor.split_with_sizes(ones) for tensor in (*self.image, *self.context, self.final)]
        blocks = len(self.image)
        return [Modulation(row[:blocks], row[blocks:-1], row[-1]) for row in zip(*cut, strict=True)]

    @classmethod
    def stack(cls, parts: Sequence["Modulation"]) -> "Modulation":
        """The rows of all `parts`, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            tuple(torch.cat(blocks) for blocks in zip(*(part.image for part in parts), strict=True)),
            tuple(torch.cat(blocks) for blocks in zip(*(part.context for part in parts), strict=True)),
            torch.cat([part.final for part in parts]),
        )


class QKV(NamedTuple):
    """Queries, keys and values, each [B, L, H, E]."""

    q: Tensor
    k: Tensor
    v: Tensor


class SelfAttention(nn.Module):
    """The linears around one attention; the attention itself is called by the block, which may join streams in it."""

    def __init__(self, config: MMDiTConfig, *, project: bool = True) -> None:
        super().__init__()
        width, head_width = config.width, config.width // config.heads
        self.heads = config.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q: nn.Module = RMSNorm(head_width) if config.qk_norm else nn.Identity()
        self.ln_k: nn.Module = RMSNorm(head_width) if config.qk_norm else nn.Identity()
        if project:
            self.proj = nn.Linear(width, width)

    def project_in(self, x: Tensor) -> QKV:
        """[B, L, D] → queries and keys (normalised) and values."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return QKV(self.ln_q(q), self.ln_k(k), v)


class StreamBlock(nn.Module):
    """One stream's half of a joint block. Text and image have the same layers with weights of their own."""

    def __init__(self, config: MMDiTConfig, *, dual: bool = False, ends_here: bool = False) -> None:
        super().__init__()
        self.ends_here = ends_here
        self.attn = SelfAttention(config, project=not ends_here)
        if dual:
            self.attn2 = SelfAttention(config)
        if not ends_here:
            self.mlp = MLP(config.width, config.mlp_ratio * config.width)
        self.adaLN_modulation = AdaLNModulation(config.width, 2 if ends_here else 9 if dual else 6)

    def finish(self, x: Tensor, attended: Tensor, modulation: Tensor, attended2: Tensor | None = None) -> Tensor:
        """Add the gated attention (and the second one), then the gated MLP."""
        _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation[:, :6].unbind(1)
        x = torch.addcmul(x, gate_msa[:, None], self.attn.proj(attended))
        if attended2 is not None:
            x = torch.addcmul(x, modulation[:, 8, None], self.attn2.proj(attended2))
        return torch.addcmul(x, gate_mlp[:, None], self.mlp(modulate(x, shift_mlp, scale_mlp)))


class JointBlock(nn.Module):
    """Text and image tokens attend to all of both; everything else keeps the streams apart."""

    def __init__(self, config: MMDiTConfig, *, dual: bool, last: bool) -> None:
        super().__init__()
        self.context_block = StreamBlock(config, ends_here=last)
        self.x_block = StreamBlock(config, dual=dual)
        self.dual = dual

    def forward(
        self, context: Tensor, x: Tensor, context_modulation: Tensor, x_modulation: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Context [B, L, D] and image tokens [B, n, D] → the same; the last block leaves the context as it is."""
        text, image = self.context_block, self.x_block
        of_text = text.attn.project_in(modulate(context, context_modulation[:, 0], context_modulation[:, 1]))
        normed = norm(x)
        of_image = image.attn.project_in(modulate_normed(normed, x_modulation[:, 0], x_modulation[:, 1]))

        joint = (torch.cat(pair, dim=1) for pair in zip(of_text, of_image, strict=True))
        attended = attention(*joint)
        attended2 = None
        if self.dual:
            second = modulate_normed(normed, x_modulation[:, 6], x_modulation[:, 7])
            attended2 = attention(*image.attn2.project_in(second))
        length = context.shape[1]
        x = image.finish(x, attended[:, length:], x_modulation, attended2)
        if not text.ends_here:
            context = text.finish(context, attended[:, :length], context_modulation)
        return context, x


class FinalLayer(nn.Module):
    """Modulate and map each token to its patch of velocity."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = AdaLNModulation(config.width, 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        out: Tensor = self.linear(modulate(x, modulation[:, 0], modulation[:, 1]))
        return out


class MMDiT(nn.Module):
    """SD3 Medium, SD3.5 Medium, Large and Large Turbo, by `config`."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_embed_size**2, config.width), requires_grad=False)
        self.t_embedder = MLPEmbedder(FREQUENCIES, config.width)
        self.y_embedder = MLPEmbedder(config.pooled_width, config.width)
        self.context_embedder = nn.Linear(config.context_width, config.width)
        self.joint_blocks = cast(
            "Sequence[JointBlock]",
            nn.ModuleList(
                JointBlock(config, dual=i in config.dual_attention, last=i == config.depth - 1)
                for i in range(config.depth)
            ),
        )
        self.final_layer = FinalLayer(config)

    def modulation(self, timestep: Tensor, pooled: Tensor) -> Modulation:
        """Everything that time and pooled text say to the blocks.

        Args:
            timestep: [N], 1000 · sigma.
            pooled: [N, pooled_width].

        Returns:
            Tables of N rows for `forward`, one row for each row of its batch.
        """
        vector = self.vector(timestep, pooled)
        return Modulation(
            tuple(block.x_block.adaLN_modulation(vector) for block in self.joint_blocks),
            tuple(block.context_block.adaLN_modulation(vector) for block in self.joint_blocks),
            self.final_layer.adaLN_modulation(vector),
        )

    def vector(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """Time [N] and pooled text [N, pooled_width] as one vector [N, D], from which every block's table is made."""
        vector: Tensor = self.t_embedder(timestep_embedding(timestep).to(pooled.dtype)) + self.y_embedder(pooled)
        return vector

    def forward(
        self,
        latents: Tensor,
        context: Tensor,
        modulation: Modulation,
        *,
        skip_layers: Collection[int] = (),
        control: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """One evaluation of the velocity field.

        Args:
            latents: [B, 16, h, w]; sides that the patch does not divide are padded around and cut again.
            context: text tokens [B, L, context_width].
            modulation: B rows.
            skip_layers: blocks that hand on what they get, for skip-layer guidance.
            control: residuals [B, n, D] of a ControlNet, added to the image tokens after block 0, 1, ….

        Returns:
            Velocity [B, 16, h, w], the derivative of latents with respect to sigma.
        """
        context, x = self.embed(latents, context)
        for i, block in enumerate(self.joint_blocks):
            if i not in skip_layers:
                context, x = block(context, x, modulation.context[i], modulation.image[i])
            if i < len(control) and (residual := control[i]) is not None:
                x = x + residual
        return self.finish(x, modulation.final, latents.shape[-2:])

    def embed(self, latents: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the first block: text tokens [B, L, D] and image tokens [B, n, D]; arguments as of `forward`."""
        return self.context_embedder(context), self.embed_image(latents)

    def embed_image(self, latents: Tensor) -> Tensor:
        """Latents [B, 16, h, w] → image tokens [B, n, D] with their positions."""
        patch = self.config.patch_size
        height, width = latents.shape[-2:]
        if height % patch or width % patch:
            latents = F.pad(latents, (0, -width % patch, 0, -height % patch), mode="circular")
        rows, columns = latents.shape[-2] // patch, latents.shape[-1] // patch
        x: Tensor = self.x_embedder(latents) + crop_pos_embed(self.pos_embed, rows, columns).to(latents.dtype)
        return x

    def finish(self, x: Tensor, modulation: Tensor, size: Sequence[int]) -> Tensor:
        """What leaves the last block, image tokens [B, n, D] → velocity [B, 16, h, w].

        Args:
            modulation: [B, 2, D], the final layer's.
            size: h and w of the latents.
        """
        patch = self.config.patch_size
        height, width = size
        rows, columns = math.ceil(height / patch), math.ceil(width / patch)
        x = self.final_layer(x, modulation)

        # [B, rows, columns, p, q, C] -> [B, C, rows, p, columns, q]: put every patch back in its place.
        patches = x.view(x.shape[0], rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        velocity: Tensor = patches.reshape(x.shape[0], -1, rows * patch, columns * patch)
        return velocity[:, :, :height, :width]
