"""Prompt to conditioning: three text encoders, put together as SD3 was trained.

    context  [1, L, C]   rows of CLIP-L and CLIP-G side by side, padded to the width of T5, then the rows of T5
    pooled   [1, P]      CLIP-L's pooled output, not projected, then CLIP-G's, projected

A missing encoder leaves zeros in its place. Weights of words act on rows: empty + (row - empty) · weight, where empty
is the row that an empty prompt has there; pooled outputs are not weighted.

Source: Esser et al. 2024 (arXiv 2403.03206), appendix; ComfyUI for weights and long prompts.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.models import ClipTextEncoder, T5Encoder
from octavo.models.adapter import Applied, adapted
from octavo.models.clip import ClipText
from octavo.models.t5 import T5Text
from octavo.text.chunks import TokenChunk, complete
from octavo.text.tokenizers import EncoderTokenizer, TokenizedPrompt, Tokenizers

LONGEST_PROMPT = 20_000  # letters; more are not even cut into tokens
# Of one encoder, padding included. SD3.5 was trained on 77 and 256; T5's memory grows with the square: 4096 take it
# 4 GB a layer.
MOST_TOKENS = 4096

Embeddings = Callable[[str], Mapping[str, Tensor] | None]
"""Finds a textual-inversion embedding by name: its tensors [vectors, width], or None."""

Chunk = tuple[Tensor, Tensor | None]
"""What an encoder makes of one: rows [1, L, W], pooled [1, P] or None."""

Encoded = tuple[Tensor, Tensor]
"""What an encoder makes of a prompt: rows [1, L, W], pooled [1, P] ([1, 0] for T5)."""

M = TypeVar("M", bound=nn.Module)


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
    """Encode one prompt; arguments as of `encode_all`."""
    return encode_all(encoders, [prompt], clip_skip)[0]


def encode_all(encoders: TextEncoders, prompts: Sequence[str], clip_skip: int = 2) -> list[Conditioning]:
    """Encode prompts, in one pass over the weights of each encoder; what each gives does not depend on the others.

    Args:
        encoders: gives the models.
        prompts: with weights and references to embeddings, see `text.prompt`.
        clip_skip: which of CLIP's last layers is read.

    Returns:
        float32 conditioning on the encoders' device.
    """
    tokens = [encoders.tokenizers.encode(prompt, embeddings=encoders.shapes) for prompt in prompts]
    return encode_tokens(encoders, tokens, clip_skip=clip_skip)


def encode_tokens(
    encoders: TextEncoders, prompts: Sequence[TokenizedPrompt], *, clip_skip: int = 2
) -> list[Conditioning]:
    """`encode_all` for prompts that are cut into tokens already.

    Raises:
        RequestError: one has more tokens than anyone can mean.
    """
    for chunks in (each for tokens in prompts for each in (tokens.clip_l, tokens.clip_g, tokens.t5)):
        if (count := sum(len(chunk.ids) for chunk in chunks or ())) > MOST_TOKENS:
            raise RequestError(f"The prompt has {count} tokens, and {MOST_TOKENS} are the most. Make it shorter.")
    kits, applied = encoders.tokenizers, dict(encoders.adapters)
    by_clip = partial(_by_clip, encoders, clip_skip)
    of_l = _of(encoders.clip_l, kits.clip_l, [each.clip_l for each in prompts], applied.get("clip_l", ()), by_clip)
    of_g = _of(encoders.clip_g, kits.clip_g, [each.clip_g for each in prompts], applied.get("clip_g", ()), by_clip)
    by_t5 = partial(_by_t5, encoders)
    of_t5 = _of(encoders.t5, kits.t5, [each.t5 for each in prompts], applied.get("t5", ()), by_t5)
    return [_put_together(encoders, *each) for each in zip(of_l, of_g, of_t5, strict=True)]


def _of(
    model: Callable[[], M] | None,
    kit: EncoderTokenizer | None,
    prompts: Sequence[Sequence[TokenChunk] | None],
    applied: Applied,
    encode_chunks: Callable[[M, Sequence[TokenChunk]], list[Chunk]],
) -> list[Encoded | None]:
    """What one encoder makes of each prompt; None where it is missing or not asked."""
    asked = [chunks for chunks in prompts if chunks]
    if model is None or kit is None or not asked:
        return [None] * len(prompts)
    loaded = model()
    with adapted(loaded, applied):
        found = iter(_encode_prompts(kit, asked, partial(encode_chunks, loaded)))
    return [next(found) if chunks else None for chunks in prompts]


def _put_together(
    encoders: TextEncoders, of_l: Encoded | None, of_g: Encoded | None, of_t5: Encoded | None
) -> Conditioning:
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


def _encode_prompts(
    kit: EncoderTokenizer,
    prompts: Sequence[Sequence[TokenChunk]],
    encode_chunks: Callable[[Sequence[TokenChunk]], list[Chunk]],
) -> list[Encoded]:
    """The chunks of each prompt, weighted, joined on the token axis; pooled from the first.

    What is asked for twice, such as the empty text that weights start from, is encoded once.
    """
    wanted = [chunk for chunks in prompts for chunk in chunks]
    wanted += [_empty(kit, chunk) for chunk in wanted if chunk.weighted]
    distinct = {_read(chunk): chunk for chunk in wanted}
    encoded = dict(zip(distinct, encode_chunks(list(distinct.values())), strict=True))

    def weighted(chunk: TokenChunk) -> Tensor:
        hidden = encoded[_read(chunk)][0].float()
        if not chunk.weighted:
            return hidden
        base = encoded[_read(_empty(kit, chunk))][0].float()
        weights = torch.tensor(chunk.weights, device=hidden.device)[None, :, None]
        return base + (hidden - base) * weights

    results = list[Encoded]()
    for chunks in prompts:
        rows, pooled = torch.cat([weighted(chunk) for chunk in chunks], dim=1), encoded[_read(chunks[0])][1]
        results.append((rows, rows.new_zeros(1, 0) if pooled is None else pooled.float()))
    return results


def _read(chunk: TokenChunk) -> Hashable:
    """All of a chunk that an encoder reads."""
    return chunk.ids, chunk.end, tuple(chunk.vectors.items())


def _empty(kit: EncoderTokenizer, chunk: TokenChunk) -> TokenChunk:
    """The empty text of the same length."""
    vocabulary = kit.vocabulary
    return complete([], before=vocabulary.before, end=vocabulary.end, pad=kit.pad, length=len(chunk.ids))


def _by_clip(
    encoders: TextEncoders, clip_skip: int, model: ClipTextEncoder, chunks: Sequence[TokenChunk]
) -> list[Chunk]:
    device = model.text_model.final_layer_norm.weight.device  # tables of tokens may be elsewhere
    texts = [
        ClipText(
            torch.tensor([chunk.ids], device=device),
            torch.tensor([chunk.end], device=device),
            _vectors(encoders, chunk),
        )
        for chunk in chunks
    ]
    return [*model.encode(texts, clip_skip=clip_skip)]


def _by_t5(encoders: TextEncoders, model: T5Encoder, chunks: Sequence[TokenChunk]) -> list[Chunk]:
    device = model.encoder.final_layer_norm.weight.device  # tables of tokens may be elsewhere
    texts = [T5Text(torch.tensor([chunk.ids], device=device), _vectors(encoders, chunk)) for chunk in chunks]
    return [(rows, None) for rows in model.encode(texts)]


def _vectors(encoders: TextEncoders, chunk: TokenChunk) -> dict[tuple[int, int], Tensor]:
    """The rows of textual-inversion embeddings that the chunk names, by (row of the batch, position)."""
    found = {}
    for position, vector in chunk.vectors.items():
        tensors = encoders.embeddings(vector.name)
        assert tensors is not None, "the tokenizer found it a moment ago"
        found[0, position] = tensors[vector.key][vector.row]
    return found
