"""The embedded model's parts, their shapes and their first weights: an MMDiT and three small text encoders.

They are the classes of `octavo.models` with small numbers put in, joined by SD3's rule of conditioning: CLIP-L's and
CLIP-G's channels side by side, padded to T5's width, then T5's rows; pooled is CLIP-L's beside CLIP-G's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from octavo.models import ClipConfig, ClipTextEncoder, MMDiT, MMDiTConfig, T5Config, T5Encoder
from octavo.models.layers import sincos_pos_embed
from octavo.text.words import word_level_tokenizer
from octavo.train.captions import LONGEST, words

POSITIONS = LONGEST + 2
PAD = 0
CLIP_WIDTH, T5_WIDTH = 64, 128


def mmdit_config(depth: int = 3) -> MMDiTConfig:
    """An MMDiT as wide as SD3's rule makes one of this depth: 64 channels a block."""
    return MMDiTConfig(
        depth=depth,
        width=64 * depth,
        heads=depth,
        context_width=T5_WIDTH,
        pooled_width=2 * CLIP_WIDTH,
        pos_embed_size=16,
    )


def tokenizers() -> tuple[Tokenizer, Tokenizer]:
    """The vocabulary of both CLIPs, and that of T5, which has no start token."""
    return word_level_tokenizer(words(), letters=True), word_level_tokenizer(words(), start=None, letters=True)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A batch of captions as the encoders read them, each [B, POSITIONS] int64; `end` is [B]."""

    clip_l: Tensor
    clip_g: Tensor
    t5: Tensor
    end: Tensor

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.clip_l.to(device), self.clip_g.to(device), self.t5.to(device), self.end.to(device))


class Tokenization:
    """Captions to `Tokens`, padded as SD3 pads them: CLIP-L with its end token, CLIP-G and T5 with 0."""

    def __init__(self) -> None:
        self.clip, self.t5 = tokenizers()
        self.end_id = self.clip.token_to_id("<end>")

    def __call__(self, captions: Sequence[str]) -> Tokens:
        clip = [encoding.ids for encoding in self.clip.encode_batch(list(captions))]
        t5 = [encoding.ids for encoding in self.t5.encode_batch(list(captions))]
        return Tokens(
            torch.tensor([ids + [self.end_id] * (POSITIONS - len(ids)) for ids in clip]),
            torch.tensor([ids + [PAD] * (POSITIONS - len(ids)) for ids in clip]),
            torch.tensor([ids + [PAD] * (POSITIONS - len(ids)) for ids in t5]),
            torch.tensor([len(ids) - 1 for ids in clip]),
        )


class DemoModel(nn.Module):
    """Everything that is trained together: `mmdit`, `clip_l`, `clip_g`, `t5xxl`, named as their files are."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        vocabulary, vocabulary_t5 = (tokenizer.get_vocab_size() for tokenizer in tokenizers())
        self.mmdit = MMDiT(mmdit_config(depth))
        self.clip_l = ClipTextEncoder(_clip("quick_gelu", vocabulary, projection=None))
        self.clip_g = ClipTextEncoder(_clip("gelu", vocabulary, projection=CLIP_WIDTH))
        self.t5xxl = T5Encoder(
            T5Config(
                width=T5_WIDTH,
                layers=2,
                heads=T5_WIDTH // 64,
                head_width=64,
                mlp_width=T5_WIDTH,
                vocab_size=vocabulary_t5,
            )
        )
        self._initialise()

    def _initialise(self) -> None:
        """Blocks begin as identities (all gates zero), the velocity as zero; embeddings small beside their norms."""
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(parameter)
            elif "embedding.weight" in name or "shared.weight" in name:
                nn.init.normal_(parameter, std=0.5 if "position" not in name else 0.1)
            elif name.endswith("bias") and "norm" not in name:
                nn.init.zeros_(parameter)
            elif name.endswith("SelfAttention.q.weight"):
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 / 8)  # T5 keeps 1/sqrt(E) in this weight
        table = self.mmdit.pos_embed
        table.data.copy_(sincos_pos_embed(table.shape[-1], 16, base_size=16))

    def matrices(self) -> set[str]:
        """Names of the weights that Muon updates: matrices inside blocks and text layers, no embeddings."""
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim == 2
            and any(part in name for part in ("joint_blocks", "encoder.layers", "encoder.block", "text_projection"))
            and "relative_attention_bias" not in name
        }

    def condition(self, tokens: Tokens, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """SD3's conditioning.

        Args:
            tokens: of B captions.
            keep: [B, 3] 0 or 1, which of CLIP-L, CLIP-G and T5 speak; a silent encoder's output is zeros.

        Returns:
            context [B, 2 · POSITIONS, T5_WIDTH] and pooled [B, 2 · CLIP_WIDTH].
        """
        hidden_l, pooled_l = self.clip_l(tokens.clip_l, end=tokens.end)
        hidden_g, pooled_g = self.clip_g(tokens.clip_g, end=tokens.end)
        rows_t5 = self.t5xxl(tokens.t5)
        if keep is not None:
            keep_l, keep_g, keep_t5 = keep.to(hidden_l.dtype)[:, :, None].unbind(1)
            hidden_l, pooled_l = hidden_l * keep_l[:, None], pooled_l * keep_l
            hidden_g, pooled_g = hidden_g * keep_g[:, None], pooled_g * keep_g
            rows_t5 = rows_t5 * keep_t5[:, None]
        clip_rows = torch.cat([hidden_l, hidden_g], dim=-1)
        clip_rows = F.pad(clip_rows, (0, T5_WIDTH - clip_rows.shape[-1]))
        return torch.cat([clip_rows, rows_t5], dim=1), torch.cat([pooled_l, pooled_g], dim=-1)

    def forward(self, latents: Tensor, sigma: Tensor, tokens: Tokens, keep: Tensor | None = None) -> Tensor:
        """Velocity [B, 16, h, w] at noisy `latents` of level `sigma` [B]."""
        context, pooled = self.condition(tokens, keep)
        velocity: Tensor = self.mmdit(latents, context, self.mmdit.modulation(1000 * sigma, pooled))
        return velocity


def _clip(activation: str, vocabulary: int, projection: int | None) -> ClipConfig:
    assert activation in ("gelu", "quick_gelu")
    return ClipConfig(
        width=CLIP_WIDTH,
        layers=2,
        heads=CLIP_WIDTH // 64,
        mlp_width=4 * CLIP_WIDTH,
        activation="gelu" if activation == "gelu" else "quick_gelu",
        vocab_size=vocabulary,
        positions=POSITIONS,
        projection=projection,
    )
