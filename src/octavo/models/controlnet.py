"""ControlNets of SD3 and SD3.5: a picture of edges, depth or blur in, residuals for the MMDiT's blocks out.

Two kinds are one class. Those released for SD3.5 Large have blocks of image tokens alone and take the MMDiT's own
patches and positions; those in diffusers' layout for SD3 Medium are the beginning of an MMDiT, text and all.

Sources: Zhang et al. 2023 (arXiv 2302.05543); Stability AI's SD3.5 ControlNets; diffusers' SD3ControlNetModel for the
kind with text.

B batch, L text tokens, n image tokens, D width, R residuals, h and w latent pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.models.layers import FREQUENCIES, MLPEmbedder, PatchEmbed, crop_pos_embed, timestep_embedding
from octavo.models.mmdit import JointBlock, MMDiTConfig, Modulation, StreamBlock
from octavo.models.ops import Target
from octavo.models.packed import Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetConfig:
    """Shape of a ControlNet; read from a file by `checkpoint.controlnets`."""

    depth: int  # blocks, and residuals
    width: int
    heads: int
    joint: bool = False  # blocks have text tokens beside the image's, as in an MMDiT
    dual_attention: tuple[int, ...] = ()  # joint blocks whose image stream has a second attention
    qk_norm: bool = False
    mlp_ratio: int = 4  # of the width
    patch_size: int = 2
    in_channels: int = 16
    control_channels: int = 16  # of the control picture's latents
    context_width: int = 4096
    pooled_width: int = 2048
    pos_embed_size: int = 0  # side of its own table of positions; 0: it takes the MMDiT's embedded latents
    zero_pooled: bool = False  # it is told zeros in place of pooled text
    last: bool = True  # whether the MMDiT's last block gets a residual, too; diffusers gives it none
    control_type: Literal["blur", "canny", "depth"] | None = None  # what the picture shows, where the file says so

    def block(self) -> MMDiTConfig:
        """The shape of its blocks."""
        return MMDiTConfig(
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            dual_attention=self.dual_attention,
            qk_norm=self.qk_norm,
            mlp_ratio=self.mlp_ratio,
        )


class ImageBlock(StreamBlock):
    """The image's half of a joint block, attending to itself."""

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """[B, n, D] and [B, 6, D] → [B, n, D]."""
        (qkv,) = self.ops.modulated(x, Target(self.attn.qkv, modulation[:, 0], modulation[:, 1]))
        attended = self.ops.attention(*self.ops.heads((self.attn, qkv)))
        del qkv  # before the widest place
        return self.finish(x, attended, modulation)


class ControlNet(nn.Module):
    """See the module."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        shape, width, patch = config.block(), config.width, config.patch_size
        self.control_embedder = PatchEmbed(patch, config.control_channels, width)
        if config.pos_embed_size:
            self.x_embedder = PatchEmbed(patch, config.in_channels, width)
            self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_embed_size**2, width), requires_grad=False)
        self.t_embedder = MLPEmbedder(FREQUENCIES, width)
        self.y_embedder = MLPEmbedder(config.pooled_width, width)
        if config.joint:
            self.context_embedder = nn.Linear(config.context_width, width)
            joint = [JointBlock(shape, dual=i in config.dual_attention, last=False) for i in range(config.depth)]
            self.blocks = nn.ModuleList(joint)
        else:
            self.blocks = nn.ModuleList(ImageBlock(shape) for _ in range(config.depth))
        self.outputs = cast("Sequence[nn.Linear]", nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth)))

    def modulation(self, timestep: Tensor, pooled: Tensor) -> Modulation:
        """What time and pooled text say to the blocks: tables of N rows; arguments as of `MMDiT.modulation`."""
        vector = self.vector(timestep, pooled)
        if self.config.joint:
            blocks = cast("Sequence[JointBlock]", self.blocks)
            return Modulation.of(
                tuple(block.x_block.adaLN_modulation(vector) for block in blocks),
                tuple(block.context_block.adaLN_modulation(vector) for block in blocks),
                vector.new_empty(len(vector), 0, self.config.width),
            )
        image = tuple(cast(ImageBlock, block).adaLN_modulation(vector) for block in self.blocks)
        return Modulation.of(image, (), vector.new_empty(len(vector), 0, self.config.width))

    def modulations(self, asked: Sequence[tuple[Tensor, Tensor]]) -> list[Modulation]:
        """`modulation` of several timesteps and pooled texts."""
        return [self.modulation(timestep, pooled) for timestep, pooled in asked]

    def vector(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """Time [N] and pooled text [N, pooled_width] as one vector [N, D], from which every block's table is made."""
        told = torch.zeros_like(pooled) if self.config.zero_pooled else pooled
        vector: Tensor = self.t_embedder(timestep_embedding(timestep).to(pooled.dtype)) + self.y_embedder(told)
        return vector

    def forward(
        self,
        latents: Tensor,
        control: Tensor,
        context: Tensor | Packed,
        modulation: Modulation,
        *,
        embed: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, ...]:
        """One evaluation.

        Args:
            latents: [B, 16, h, w], what the MMDiT sees.
            control: [B, 16, h, w], the control picture's latents.
            context: text tokens [B, L, context_width], or packed; only the joint kind reads them.
            modulation: B rows.
            embed: the MMDiT's `embed_image`, for the kind without patches of its own.

        Returns:
            R residuals [B, n, D]; `spread` says which block gets which.
        """
        x = self.embed(latents, control, embed)
        packed = context if isinstance(context, Packed) else None
        text = context.tokens if isinstance(context, Packed) else context
        told = self.context_embedder(text) if self.config.joint else None
        residuals, of_text, of_image = [], modulation.context, modulation.image
        for i, (block, output) in enumerate(zip(self.blocks, self.outputs, strict=True)):
            if told is not None:
                told, x = block(told, x, of_text[i], of_image[i], packed)
            else:
                x = block(x, of_image[i])
            residuals.append(output(x))
        return tuple(residuals)

    def embed(self, latents: Tensor, control: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """The image tokens [B, n, D] that enter the first block; arguments as of `forward`."""
        if self.config.pos_embed_size:
            padded = _padded(latents, self.config.patch_size)
            rows, columns = (side // self.config.patch_size for side in padded.shape[-2:])
            x: Tensor = self.x_embedder(padded) + crop_pos_embed(self.pos_embed, rows, columns).to(latents.dtype)
        else:
            x = embed(latents)
        x = x + self.control_embedder(_padded(control, self.config.patch_size))
        return x


def spread(residuals: Sequence[Tensor], depth: int, *, last: bool) -> list[Tensor | None]:
    """By block of an MMDiT of this depth, the residual that it gets.

    Args:
        last: whether the last block gets one. Stability AI's code gives it one, diffusers does not.
    """
    spread = [residuals[i * len(residuals) // depth] for i in range(depth)]
    return [*spread[:-1], spread[-1] if last else None]


def _padded(latents: Tensor, patch: int) -> Tensor:
    """Sides that the patch does not divide are padded around, as the MMDiT does."""
    height, width = latents.shape[-2:]
    if height % patch or width % patch:
        return F.pad(latents, (0, -width % patch, 0, -height % patch), mode="circular")
    return latents
