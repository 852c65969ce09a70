"""Prompt to conditioning: three text encoders, put together as SD3 was trained.

    context  [1, L, C]   rows of CLIP-L and CLIP-G side by side, padded to the width of T5, then the rows of T5
    pooled   [1, P]      CLIP-L's pooled output, not projected, then CLIP-G's, projected

A missing encoder leaves zeros in its place. Weights of words act on rows: empty + (row - empty) · weight, where empty
is the row that an empty prompt has there; pooled outputs are not weighted.

Source: Esser et al. 2024 (arXiv 2403.03206), appendix; ComfyUI for weights and long prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import RequestError
from octavo.models import ClipTextEncoder, T5Encoder
from octavo.models.adapter import Applied, adapted
from octavo.text.chunks import TokenChunk, complete
from octavo.text.tokenizers import EncoderTokenizer, TokenizedPrompt, Tokenizers

LONGEST_PROMPT = 20_000  # letters; more are not even cut into tokens
# Of one encoder, padding included. SD3.5 was trained on 77 and 256; T5's memory grows with the square: 4096 take it
# 4 GB a layer.
MOST_TOKENS = 4096

Embeddings = Callable[[str], Mapping[str, Tensor] | None]
"""Finds a textual-inversion embedding by name: its tensors [vectors, width], or None."""

EncodeChunk = Callable[[TokenChunk], tuple[Tensor, Tensor | None]]
"""One chunk → (rows [1, L, W], pooled [1, P] or None)."""


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """A prompt as the MMDiT sees it; equal only to itself, so that it can name an entry of a table."""

    context: Tensor  # [1, L, C]
    pooled: Tensor  # [1, P]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditioning":
        """The same on another device, in another dtype; itself where it is there already."""
        context, pooled = self.context.to(device, dtype), self.pooled.to(device, dtype)
        return self if context is self.context and pooled is self.pooled else Conditioning(context, pooled)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class TextEncoders:
    """What turns prompts into conditioning; None for an encoder that is missing."""

    tokenizers: Tokenizers
    clip_l: Callable[[], ClipTextEncoder] | None  # called when needed, so that a model may be loaded late
    clip_g: Callable[[], ClipTextEncoder] | None
    t5: Callable[[], T5Encoder] | None
    context_width: int  # C, of the MMDiT
    pooled_width: int  # P, of the MMDiT
    positions: int = 77  # rows of zeros that stand for a prompt without any encoder
    embeddings: Embeddings = lambda _name: None
    adapters: tuple[tuple[str, Applied], ...] = ()  # LoRAs that act on an encoder: clip_l, clip_g or t5
    plain: "TextEncoders | None" = None  # the same without them

    def adapted(self, adapters: Mapping[str, Applied]) -> "TextEncoders":
        """The same with more LoRAs, by encoder; itself where there are none."""
        merged = dict(self.adapters)
        for encoder, applied in adapters.items():
            merged[encoder] = merged.get(encoder, ()) + applied
        merged = {encoder: applied for encoder, applied in sorted(merged.items()) if applied}
        if merged == dict(self.adapters):
            return self
        return replace(self, adapters=tuple(merged.items()), plain=self.plain or self)

    def shapes(self, name: str) -> dict[str, tuple[int, int]] | None:
        """(vectors, width) of each tensor of an embedding, as the tokenizers want to know them; None if not found."""
        tensors = self.embeddings(name)
        return None if tensors is None else {key: (len(t), t.shape[1]) for key, t in tensors.items()}


def encode(encoders: TextEncoders, prompt: str, clip_skip: int = 2) -> Conditioning:
    """Encode one prompt.

    Args:
        encoders: gives the models.
        prompt: with weights and references to embeddings, see `text.prompt`.
        clip_skip: which of CLIP's last layers is read.

    Returns:
        float32 conditioning on the encoders' device.
    """
    tokens = encoders.tokenizers.encode(prompt, embeddings=encoders.shapes)
    return encode_tokens(encoders, tokens, clip_skip=clip_skip)


def encode_tokens(encoders: TextEncoders, tokens: TokenizedPrompt, *, clip_skip: int = 2) -> Conditioning:
    """`encode` for a prompt that is cut into tokens already.

    Raises:
        RequestError: it has more tokens than anyone can mean.
    """
    for chunks in (tokens.clip_l, tokens.clip_g, tokens.t5):
        if (count := sum(len(chunk.ids) for chunk in chunks or ())) > MOST_TOKENS:
            raise RequestError(f"The prompt has {count} tokens, and {MOST_TOKENS} are the most. Make it shorter.")
    kits, applied = encoders.tokenizers, dict(encoders.adapters)
    of_l = of_g = of_t5 = None
    if encoders.clip_l and tokens.clip_l and kits.clip_l:
        clip = encoders.clip_l()
        with adapted(clip, applied.get("clip_l", ())):
            of_l = _encode_all(kits.clip_l, tokens.clip_l, _with_clip(encoders, clip, clip_skip))
    if encoders.clip_g and tokens.clip_g and kits.clip_g:
        clip = encoders.clip_g()
        with adapted(clip, applied.get("clip_g", ())):
            of_g = _encode_all(kits.clip_g, tokens.clip_g, _with_clip(encoders, clip, clip_skip))
    if encoders.t5 and tokens.t5 and kits.t5:
        t5 = encoders.t5()
        with adapted(t5, applied.get("t5", ())):
            of_t5 = _encode_all(kits.t5, tokens.t5, _with_t5(encoders, t5))

    context: list[Tensor] = []
    pooled = torch.zeros(1, encoders.pooled_width)
    if of_l or of_g:
        width_g = of_g[0].shape[-1] if of_g else encoders.pooled_width - _width(of_l)
        width_l = of_l[0].shape[-1] if of_l else encoders.pooled_width - width_g
        context.append(_side_by_side(of_l, width_l, of_g, width_g, encoders.context_width))
        halves = [(of_l, width_l), (of_g, encoders.pooled_width - width_l)]
        like = context[0]
        pooled = torch.cat([like.new_zeros(1, width) if half is None else half[1] for half, width in halves], dim=-1)
    if of_t5:
        context.append(of_t5[0])
    if not context:
        context.append(torch.zeros(1, encoders.positions, encoders.context_width))
    return Conditioning(torch.cat(context, dim=1), pooled.to(context[0].device))


Encoded = tuple[Tensor, Tensor]  # rows [1, L, W], pooled [1, P] ([1, 0] for T5)


def _width(encoded: Encoded | None) -> int:
    assert encoded is not None
    return encoded[0].shape[-1]


def _side_by_side(of_l: Encoded | None, width_l: int, of_g: Encoded | None, width_g: int, total: int) -> Tensor:
    """CLIP-L's channels, CLIP-G's, then zeros up to `total`: [1, L, total], as long as the shorter of the two."""
    length = min(encoded[0].shape[1] for encoded in (of_l, of_g) if encoded)
    (present,) = [encoded[0] for encoded in (of_l, of_g) if encoded][:1]
    parts = [
        encoded[0][:, :length] if encoded else present.new_zeros(1, length, width)
        for encoded, width in ((of_l, width_l), (of_g, width_g))
    ]
    return F.pad(torch.cat(parts, dim=-1), (0, total - width_l - width_g))


def _encode_all(kit: EncoderTokenizer, chunks: Sequence[TokenChunk], encode_chunk: EncodeChunk) -> Encoded:
    """All chunks of one encoder, weighted, joined on the token axis; pooled from the first."""
    outputs = [encode_chunk(chunk) for chunk in chunks]
    rows = [_weighted(hidden, chunk, kit, encode_chunk) for (hidden, _), chunk in zip(outputs, chunks, strict=True)]
    pooled = outputs[0][1]
    return torch.cat(rows, dim=1), rows[0].new_zeros(1, 0) if pooled is None else pooled.float()


def _weighted(hidden: Tensor, chunk: TokenChunk, kit: EncoderTokenizer, encode_chunk: EncodeChunk) -> Tensor:
    hidden = hidden.float()
    if not chunk.weighted:
        return hidden
    vocabulary = kit.vocabulary
    empty = complete([], before=vocabulary.before, end=vocabulary.end, pad=kit.pad, length=len(chunk.ids))
    base = encode_chunk(empty)[0].float()
    weights = torch.tensor(chunk.weights, device=hidden.device)[None, :, None]
    return base + (hidden - base) * weights


def _with_clip(encoders: TextEncoders, model: ClipTextEncoder, clip_skip: int) -> EncodeChunk:
    device = model.text_model.final_layer_norm.weight.device  # tables of tokens may be elsewhere

    def encode_chunk(chunk: TokenChunk) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([chunk.ids], device=device)
        end = torch.tensor([chunk.end], device=device)
        hidden, pooled = model(tokens, end=end, vectors=_vectors(encoders, chunk), clip_skip=clip_skip)
        return hidden, pooled

    return encode_chunk


def _with_t5(encoders: TextEncoders, model: T5Encoder) -> EncodeChunk:
    device = model.encoder.final_layer_norm.weight.device  # tables of tokens may be elsewhere

    def encode_chunk(chunk: TokenChunk) -> tuple[Tensor, None]:
        return model(torch.tensor([chunk.ids], device=device), vectors=_vectors(encoders, chunk)), None

    return encode_chunk


def _vectors(encoders: TextEncoders, chunk: TokenChunk) -> dict[tuple[int, int], Tensor]:
    """The rows of textual-inversion embeddings that the chunk names, by (row of the batch, position)."""
    found = {}
    for position, vector in chunk.vectors.items():
        tensors = encoders.embeddings(vector.name)
        assert tensors is not None, "the tokenizer found it a moment ago"
        found[0, position] = tensors[vector.key][vector.row]
    return found
