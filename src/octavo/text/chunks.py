"""Tokens of a prompt, cut to the length that an encoder reads at once.

Plain data in, plain data out: which numbers stand for which words is settled in `tokenizers`, what a vector of a
textual-inversion embedding looks like where the embedding's file is read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

LONG_GROUP = 8  # tokens; a shorter group moves whole to the next chunk instead of being split


@dataclass(frozen=True, slots=True)
class Vector:
    """One row of a textual-inversion embedding, which stands in a chunk instead of a word's own vector."""

    name: str  # as the prompt names it
    key: str  # of the tensor in the embedding's file
    row: int


@dataclass(frozen=True, slots=True)
class Token:
    """A word piece with its weight, or a place for a `Vector` (the id is then 0 and without meaning)."""

    id: int
    weight: float = 1.0
    vector: Vector | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """What an encoder reads at once: `ids` and `weights` are of one length, padding included."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]  # 1.0 for start, end and padding
    end: int  # position of the first end token, from which CLIP takes its pooled output
    vectors: Mapping[int, Vector] = field(default_factory=dict)  # by position

    @property
    def weighted(self) -> bool:
        """Whether any weight differs from 1."""
        return any(weight != 1.0 for weight in self.weights)


def cut_into_chunks(groups: Iterable[Sequence[Token]], room: int | None) -> list[list[Token]]:
    """Fill chunks with groups of tokens, in order.

    Args:
        groups: tokens that belong together, such as the text inside one pair of brackets.
        room: tokens that fit in a chunk, at least 1; None for one chunk without end.

    Returns:
        At least one chunk. A group that does not fit moves whole to the next chunk if it has fewer than 8 tokens and
        fits there; otherwise it is split where the chunk is full.
    """
    chunks: list[list[Token]] = [[]]
    for group in groups:
        rest = list(group)
        if room is not None:
            may_split = len(rest) >= LONG_GROUP or len(rest) > room
            while len(chunks[-1]) + len(rest) > room:
                fitting = room - len(chunks[-1]) if may_split else 0
                chunks[-1] += rest[:fitting]
                rest = rest[fitting:]
                chunks.append([])
        chunks[-1] += rest
    return chunks


def complete(content: Sequence[Token], *, before: Sequence[int], end: int, pad: int, length: int) -> TokenChunk:
    """Put the special tokens around a chunk's content and pad it to `length` (or leave it longer)."""
    tokens = [*map(Token, before), *content, Token(end)]
    tokens += [Token(pad)] * (length - len(tokens))
    return TokenChunk(
        ids=tuple(token.id for token in tokens),
        weights=tuple(token.weight for token in tokens),
        end=next(at for at, token in enumerate(tokens) if token.id == end and token.vector is None),
        vectors={at: token.vector for at, token in enumerate(tokens) if token.vector is not None},
    )
