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
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.models.layers import (
    FREQUENCIES,
    MLP,
    AdaLNModulation,
    MLPEmbedder,
    PatchEmbed,
    RMSNorm,
    crop_pos_embed,
    modulate,
    timestep_embedding,
)
from octavo.models.ops import PLAIN, Ops, Target
from octavo.models.packed import Packed


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


class Modulation:
    """Shift, scale and gate vectors of every block for N rows (a row: one sigma of one prompt).

    They lie in one tensor, a row beside the other, so that taking rows of many requests together is one copy however
    deep the model is.

    Attributes:
        flat: [N, S·D], all vectors of a row one after the other.
        chunks: how many vectors of D there are for each block's image stream, each block's text stream, and the end.
    """

    __slots__ = ("chunks", "flat")

    def __init__(self, flat: Tensor, chunks: tuple[tuple[int, ...], tuple[int, ...], int]) -> None:
        self.flat, self.chunks = flat, chunks

    @classmethod
    def of(cls, image: Sequence[Tensor], context: Sequence[Tensor], final: Tensor) -> "Modulation":
        """From by-block tables [N, 6 or 9, D] and [N, 6, D] (the last [N, 2, D]), and the final layer's [N, 2, D]."""
        chunks = (tuple(t.shape[1] for t in image), tuple(t.shape[1] for t in context), final.shape[1])
        return cls(torch.cat([t.flatten(1) for t in (*image, *context, final)], dim=1), chunks)

    def __len__(self) -> int:
        return len(self.flat)

    @property
    def image(self) -> tuple[Tensor, ...]:
        """By block [N, 6 or 9, D]: views, made when asked."""
        return self._tables[: len(self.chunks[0])]

    @property
    def context(self) -> tuple[Tensor, ...]:
        """By block [N, 6, D]; the last [N, 2, D]; none for ControlNets without text."""
        return self._tables[len(self.chunks[0]) : -1]

    @property
    def final(self) -> Tensor:
        """[N, 2, D]; [N, 0, D] for ControlNets."""
        return self._tables[-1]

    @property
    def _tables(self) -> tuple[Tensor, ...]:
        image, context, final = self.chunks
        each = (*image, *context, final)
        width = self.flat.shape[1] // sum(each)
        return tuple(self.flat.view(len(self.flat), -1, width).split_with_sizes(each, dim=1))

    def each(self) -> list["Modulation"]:
        """Every row by itself."""
        return [Modulation(row, self.chunks) for row in self.flat.split_with_sizes([1] * len(self.flat))]

    @classmethod
    def stack(cls, parts: Sequence["Modulation"]) -> "Modulation":
        """The rows of all `parts`, one after the other."""
        return parts[0] if len(parts) == 1 else cls(torch.cat([part.flat for part in parts]), parts[0].chunks)


class SelfAttention(nn.Module):
    """The layers around one attention; the attention itself is called by the block, which may join streams in it."""

    def __init__(self, config: MMDiTConfig, *, project: bool = True) -> None:
        super().__init__()
        width, head_width = config.width, config.width // config.heads
        self.heads = config.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q: nn.Module = RMSNorm(head_width) if config.qk_norm else nn.Identity()
        self.ln_k: nn.Module = RMSNorm(head_width) if config.qk_norm else nn.Identity()
        if project:
            self.proj = nn.Linear(width, width)


class StreamBlock(nn.Module):
    """One stream's half of a joint block. Text and image have the same layers with weights of their own."""

    ops: Ops = PLAIN

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
        _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp, *second = modulation.unbind(-2)
        gate, branch = gate_msa, self.attn.proj(attended)
        if attended2 is not None:
            x = self.ops.residual(x, gate, branch)
            gate, branch = second[2], self.attn2.proj(attended2)
        x, hidden = self.ops.residual_modulated(x, gate, branch, Target(self.mlp.fc1, shift_mlp, scale_mlp))
        return self.ops.residual(x, gate_mlp, self.ops.gelu(hidden, self.mlp.fc2))


class JointBlock(nn.Module):
    """Text and image tokens attend to all of both; everything else keeps the streams apart."""

    ops: Ops = PLAIN

    def __init__(self, config: MMDiTConfig, *, dual: bool, last: bool) -> None:
        super().__init__()
        self.context_block = StreamBlock(config, ends_here=last)
        self.x_block = StreamBlock(config, dual=dual)
        self.dual = dual

    def forward(
        self,
        context: Tensor,
        x: Tensor,
        context_modulation: Tensor,
        x_modulation: Tensor,
        packed: Packed | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Context [B, L, D] and image tokens [B, n, D] → the same; the last block leaves the context as it is.

        Args:
            packed: says how the rows' text lies in a context [1, ΣL, D], where their lengths differ.
        """
        text, image, ops = self.context_block, self.x_block, self.ops
        if packed is not None:
            context_modulation = packed.per_token(context_modulation)
        shift, scale = context_modulation[..., 0, :], context_modulation[..., 1, :]
        (of_text,) = ops.modulated(context, Target(text.attn.qkv, shift, scale))
        first = Target(image.attn.qkv, x_modulation[:, 0], x_modulation[:, 1])
        attended2 = None
        if self.dual:
            second = Target(image.attn2.qkv, x_modulation[:, 6], x_modulation[:, 7])
            of_image, of_image2 = ops.modulated(x, first, second)
            attended2 = ops.attention(*ops.heads((image.attn2, of_image2)))
            del of_image2
        else:
            (of_image,) = ops.modulated(x, first)
        if packed is None:
            attended = ops.attention(*ops.heads((text.attn, of_text), (image.attn, of_image)))
            to_text, to_image = attended[:, : context.shape[1]], attended[:, context.shape[1] :]
        else:
            to_text, to_image = self._attended_by_group(of_text, of_image, packed)
        del of_text, of_image  # the MLP is the widest place: what it does not need leaves before
        x = image.finish(x, to_image, x_modulation, attended2)
        if not text.ends_here:
            context = text.finish(context, to_text, context_modulation)
        return context, x

    def _attended_by_group(self, of_text: Tensor, of_image: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
        """Joint attention of rows of unlike lengths, from what the qkv layers gave: [1, ΣL, D] and [B, n, D]."""
        texts, images = [], []
        for group in packed.groups():
            streams = (self.context_block.attn, group.of(of_text)), (self.x_block.attn, of_image[group.rows])
            attended = self.ops.attention(*self.ops.heads(*streams))
            texts.append(attended[:, : group.length].flatten(0, 1))
            images.append(attended[:, group.length :])
        return torch.cat(texts)[None], torch.cat(images)


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
        return self.modulations([(timestep, pooled)])[0]

    def modulations(self, asked: Sequence[tuple[Tensor, Tensor]]) -> list[Modulation]:
        """`modulation` of several timesteps and pooled texts, layer by layer: weights that have to be fetched are
        fetched once for all. The products of each are its own, so that a table does not depend on its company.
        """
        vectors = [self.vector(timestep, pooled) for timestep, pooled in asked]
        image = [[block.x_block.adaLN_modulation(each) for each in vectors] for block in self.joint_blocks]
        context = [[block.context_block.adaLN_modulation(each) for each in vectors] for block in self.joint_blocks]
        final = [self.final_layer.adaLN_modulation(each) for each in vectors]
        return [
            Modulation.of([block[i] for block in image], [block[i] for block in context], final[i])
            for i in range(len(vectors))
        ]

    def vector(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """Time [N] and pooled text [N, pooled_width] as one vector [N, D], from which every block's table is made."""
        vector: Tensor = self.t_embedder(timestep_embedding(timestep).to(pooled.dtype)) + self.y_embedder(pooled)
        return vector

    def forward(
        self,
        latents: Tensor,
        context: Tensor | Packed,
        modulation: Modulation,
        *,
        skip_layers: Collection[int] = (),
        control: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """One evaluation of the velocity field.

        Args:
            latents: [B, 16, h, w]; sides that the patch does not divide are padded around and cut again.
            context: text tokens [B, L, context_width]; packed where the lengths of the rows differ.
            modulation: B rows.
            skip_layers: blocks that hand on what they get, for skip-layer guidance.
            control: residuals [B, n, D] of a ControlNet, added to the image tokens after block 0, 1, ….

        Returns:
            Velocity [B, 16, h, w], the derivative of latents with respect to sigma.
        """
        packed = context if isinstance(context, Packed) else None
        tokens, x = self.embed(latents, context.tokens if isinstance(context, Packed) else context)
        of_text, of_image = modulation.context, modulation.image
        for i, block in enumerate(self.joint_blocks):
            if i not in skip_layers:
                tokens, x = block(tokens, x, of_text[i], of_image[i], packed)
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
