"""CLIP's text encoder, as SD3 uses two of it: CLIP-L and CLIP-G (OpenCLIP bigG).

Only the mathematics, in Hugging Face's key layout (`text_model.encoder.layers.0.self_attn.q_proj.weight` …).

Sources: Radford et al. 2021 (arXiv 2103.00020); OpenCLIP.

B chunks of text, T positions (77 in released models), W width, H heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.models.attention import attention
from octavo.models.layers import Embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Shape of a CLIP text encoder."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Literal["quick_gelu", "gelu"]
    vocab_size: int = 49408
    positions: int = 77
    projection: int | None = (
        None  # width of the projected pooled output; None gives it unprojected, as SD3 wants CLIP-L
    )

    @classmethod
    def clip_l(cls) -> "ClipConfig":
        """OpenAI's CLIP ViT-L/14: 123 million weights."""
        return cls(width=768, layers=12, heads=12, mlp_width=3072, activation="quick_gelu")

    @classmethod
    def clip_g(cls) -> "ClipConfig":
        """OpenCLIP ViT-bigG/14: 695 million weights."""
        return cls(width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu", projection=1280)


class ClipEmbeddings(nn.Module):
    """Tokens and their positions as vectors."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.width)
        self.position_embedding = Embedding(config.positions, config.width)

    def forward(self, tokens: Tensor, vectors: Mapping[tuple[int, int], Tensor]) -> Tensor:
        embedded: Tensor = self.token_embedding(tokens)
        for (row, position), vector in vectors.items():
            embedded[row, position] = vector.to(embedded)
        return embedded + self.position_embedding.weight[: tokens.shape[1]]


class ClipAttention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.out_proj(attention(q, k, v, causal=True))
        return out


class ClipMLP(nn.Module):
    """Linear, GELU or its quick form x · sigmoid(1.702 x), linear."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.quick = config.activation == "quick_gelu"
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        out: Tensor = self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))
        return out


class ClipLayer(nn.Module):
    """Attention, then MLP, each on a layer norm of its input."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = ClipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = ClipMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return torch.add(x, self.mlp(self.layer_norm2(x)))


class ClipStack(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.layers))


class ClipTextModel(nn.Module):
    """What the files keep under `text_model.`"""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(config)
        self.encoder = ClipStack(config)
        self.final_layer_norm = nn.LayerNorm(config.width)


class ClipText(NamedTuple):
    """Chunks of text, as the encoder is told them."""

    tokens: Tensor  # [B, T] int64
    end: Tensor  # [B] position of each row's end token, where the pooled output is read
    vectors: Mapping[tuple[int, int], Tensor] = {}  # textual inversion's [W], for tokens' embeddings by (row, position)


class ClipTextEncoder(nn.Module):
    """CLIP-L or CLIP-G, by `config`."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = ClipTextModel(config)
        if config.projection is not None:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(
        self,
        tokens: Tensor,
        *,
        end: Tensor,
        vectors: Mapping[tuple[int, int], Tensor] | None = None,
        clip_skip: int = 2,
    ) -> tuple[Tensor, Tensor]:
        """Encode chunks of text.

        Args:
            tokens: [B, T] int64.
            end: [B] position of each row's end token, where the pooled output is read.
            vectors: textual-inversion vectors [W] that stand in for the embedding of a token, by (row, position).
            clip_skip: the hidden states are those that leave the clip_skip-th last layer; SD3 uses 2.

        Returns:
            hidden: [B, T, W], not through the final norm.
            pooled: [B, W] after all layers and the final norm, or [B, projection] if the model projects it.
        """
        return self.encode([ClipText(tokens, end, vectors or {})], clip_skip=clip_skip)[0]

    def encode(self, texts: Sequence[ClipText], *, clip_skip: int = 2) -> list[tuple[Tensor, Tensor]]:
        """`forward` of several texts, layer by layer: weights that have to be fetched are fetched once for all. The
        products of each are its own, so that no text depends on its company.
        """
        xs: list[Tensor] = [self.text_model.embeddings(text.tokens, text.vectors) for text in texts]
        hidden = xs
        layers = self.text_model.encoder.layers
        for i, layer in enumerate(layers):
            xs = [layer(x) for x in xs]
            if i == len(layers) - clip_skip:
                hidden = xs
        return [(each, self._pooled(x, text.end)) for each, x, text in zip(hidden, xs, texts, strict=True)]

    def _pooled(self, x: Tensor, end: Tensor) -> Tensor:
        pooled: Tensor = self.text_model.final_layer_norm(x[torch.arange(len(x), device=x.device), end])
        return pooled if self.config.projection is None else self.text_projection(pooled)
