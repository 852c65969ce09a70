"""The encoder of T5 v1.1 (T5-XXL in SD3): tokens in, one vector a token out.

Only the mathematics, in Hugging Face's key layout (`encoder.block.0.layer.0.SelfAttention.q.weight` …).

Source: Raffel et al. 2020 (arXiv 1910.10683), with the gated GELU of version 1.1 (Shazeer 2020, arXiv 2002.05202).

B prompts, L tokens, W width, H heads, E head width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.models.attention import attention
from octavo.models.layers import Embedding, RMSNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config:
    """Shape of a T5 encoder."""

    width: int
    layers: int
    heads: int
    head_width: int
    mlp_width: int
    vocab_size: int = 32128
    buckets: int = 32  # of relative positions, half for each direction
    max_distance: int = 128  # beyond it all positions share a bucket

    @classmethod
    def xxl(cls) -> "T5Config":
        """T5 v1.1 XXL's encoder: 4.8 billion weights."""
        return cls(width=4096, layers=24, heads=64, head_width=64, mlp_width=10240)


def relative_buckets(length: int, config: T5Config, device: torch.device) -> Tensor:
    """Bucket of the distance from every query to every key: exact when near, logarithmic when far.

    Returns:
        [length, length] int64 below `config.buckets`; the upper half is for keys that come after the query.
    """
    positions = torch.arange(length, device=device)
    distance = positions[None, :] - positions[:, None]
    half = config.buckets // 2
    exact = half // 2
    far = distance.abs().clamp(min=1).float()
    logarithmic = exact + (torch.log(far / exact) / math.log(config.max_distance / exact) * (half - exact)).long()
    near = torch.where(distance.abs() < exact, distance.abs(), logarithmic.clamp(max=half - 1))
    return near + half * (distance > 0)


class T5SelfAttention(nn.Module):
    """Attention without scaling of the logits: T5 keeps that factor in its weights."""

    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_width
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)
        if has_bias:
            self.relative_attention_bias = Embedding(config.buckets, config.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q, self.k, self.v))
        out: Tensor = self.o(attention(q, k, v, bias=bias.to(q.dtype), scale=1.0))
        return out


class T5LayerSelfAttention(nn.Module):
    """Norm, attention, residual; the files call it `layer.0`."""

    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = T5SelfAttention(config, has_bias=has_bias)
        self.layer_norm = RMSNorm(config.width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return torch.add(x, self.SelfAttention(self.layer_norm(x), bias))


class T5GatedMLP(nn.Module):
    """GELU (tanh) of one linear times another, then a third."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wi_1 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.wo = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return out


class T5LayerFF(nn.Module):
    """Norm, gated MLP, residual; the files call it `layer.1`."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = T5GatedMLP(config)
        self.layer_norm = RMSNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.DenseReluDense(self.layer_norm(x)))


class T5Block(nn.Module):
    """Self-attention, then gated MLP."""

    def __init__(self, config: T5Config, *, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5LayerSelfAttention(config, has_bias=has_bias), T5LayerFF(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = self.layer[1](self.layer[0](x, bias))
        return out


class T5Stack(nn.Module):
    """What the files keep under `encoder.`"""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.block = cast(
            "Sequence[T5Block]", nn.ModuleList(T5Block(config, has_bias=i == 0) for i in range(config.layers))
        )
        self.final_layer_norm = RMSNorm(config.width)


class T5Text(NamedTuple):
    """Prompts of one length, as the encoder is told them."""

    tokens: Tensor  # [B, L] int64
    vectors: Mapping[tuple[int, int], Tensor] = {}  # textual inversion's [W], for tokens' embeddings by (row, position)


class T5Encoder(nn.Module):
    """T5 v1.1's encoder, by `config`. The tokens are not masked: SD3 was trained on padded prompts without a mask."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.width)
        self.encoder = T5Stack(config)

    def forward(self, tokens: Tensor, vectors: Mapping[tuple[int, int], Tensor] | None = None) -> Tensor:
        """Encode prompts.

        Args:
            tokens: [B, L] int64.
            vectors: textual-inversion vectors [W] that stand in for the embedding of a token, by (row, position).

        Returns:
            [B, L, W], after the final norm.
        """
        return self.encode([T5Text(tokens, vectors or {})])[0]

    def encode(self, texts: Sequence[T5Text]) -> list[Tensor]:
        """`forward` of several texts, of lengths that may differ, layer by layer: weights that have to be fetched are
        fetched once for all. The products of each are its own, so that no text depends on its company.
        """
        xs = [self._embedded(text) for text in texts]
        # The first block's table of position biases serves all blocks.
        attention_layer = cast(T5LayerSelfAttention, self.encoder.block[0].layer[0])
        table = attention_layer.SelfAttention.relative_attention_bias
        biases = dict[int, Tensor]()
        for length in dict.fromkeys(x.shape[1] for x in xs):
            buckets = relative_buckets(length, self.config, texts[0].tokens.device)
            biases[length] = table(buckets).permute(2, 0, 1)[None]
        for block in self.encoder.block:
            xs = [block(x, biases[x.shape[1]]) for x in xs]
        return [self.encoder.final_layer_norm(x) for x in xs]

    def _embedded(self, text: T5Text) -> Tensor:
        x: Tensor = self.shared(text.tokens)
        for (row, position), vector in text.vectors.items():
            x[row, position] = vector.to(x)
        return x
