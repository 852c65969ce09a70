"""Text of unlike lengths in one call: the tokens of all rows one after the other, none of them padding.

A linear layer does not ask which row a token belongs to; modulation and gates are gathered token by token
(`per_token`), and attention goes group by group over rows of equal length. Rows of one length need none of this: `pack`
leaves them as they are.

B rows, L text tokens of a row, C channels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Text tokens of B rows of unlike lengths."""

    tokens: Tensor  # [1, ΣL, C]
    lengths: tuple[int, ...]  # L of each row
    rows: Tensor  # [ΣL] int64 on the tokens' device: the row that each token belongs to

    def __len__(self) -> int:
        return len(self.lengths)

    def per_token(self, table: Tensor) -> Tensor:
        """Vectors of each row [B, …] as vectors of each token [1, ΣL, …]."""
        return table.index_select(0, self.rows)[None]

    def groups(self) -> Iterator["Group"]:
        """Neighbouring rows of equal length, in order."""
        row = token = 0
        for length, same in groupby(self.lengths):
            count = len(list(same))
            yield Group(slice(row, row + count), slice(token, token + count * length), length)
            row, token = row + count, token + count * length


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of equal length that lie side by side."""

    rows: slice  # of B
    tokens: slice  # of ΣL
    length: int

    def of(self, packed: Tensor) -> Tensor:
        """Its part of [1, ΣL, …] as [rows, L, …], a view."""
        tokens = packed[0, self.tokens]
        return tokens.view(-1, self.length, *tokens.shape[1:])


def pack(contexts: Sequence[Tensor]) -> Tensor | Packed:
    """Rows in one tensor, [B, L, C], where their lengths are equal; packed where they are not.

    Args:
        contexts: each [b, L, C]. Equal lengths are best side by side: each change of length is a call of the attention.
    """
    if len({context.shape[1] for context in contexts}) == 1:
        return torch.cat(list(contexts))
    lengths = [context.shape[1] for context in contexts for _ in range(len(context))]
    tokens = torch.cat([context.flatten(0, 1) for context in contexts])[None]
    return Packed(tokens, tuple(lengths), _rows(tuple(lengths), tokens.device))


@lru_cache(maxsize=64)
def _rows(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The row of each token; kept, for bringing it to a GPU stops a step."""
    with torch.inference_mode(False):
        return torch.tensor([row for row, length in enumerate(lengths) for _ in range(length)], device=device)
