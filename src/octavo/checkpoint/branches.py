"""Low-rank branches whose layer is made of several pieces of a file: joined into one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.checkpoint.octavo_form import LowRank
from octavo.checkpoint.tensors import TensorFile


class Stretch(NamedTuple):
    """Rows start to stop of one piece, which lie below those of the stretches before it."""

    branch: LowRank | None
    start: int
    stop: int


def join(
    file: TensorFile, stretches: Sequence[Stretch], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The branch of the whole, down [r, K] and up [N, r] with N rows in all; at least one piece has a branch.

    Pieces with the same `down`, such as halves that change places or a matrix that was split, share it; others lie
    side by side in r.

    Raises:
        CorruptFileError: a branch holds NaN or infinity.
    """
    downs: list[Tensor] = []
    ups: list[tuple[int, int, Tensor]] = []  # rows above it, number of its down, itself
    above = 0
    for branch, start, stop in stretches:
        if branch is not None:
            down = torch.empty(branch.down.shape, dtype=dtype, device=device)
            file.read_into(branch.down.name, down)
            up = torch.empty(stop - start, branch.rank, dtype=dtype, device=device)
            file.read_into(branch.up.name, up, rows=(start, stop))
            number = next((i for i, other in enumerate(downs) if torch.equal(other, down)), len(downs))
            if number == len(downs):
                downs.append(down)
            ups.append((above, number, up))
        above += stop - start
    if len(ups) == len(stretches) == 1:
        return downs[0], ups[0][2]
    whole = torch.zeros(above, sum(down.shape[0] for down in downs), dtype=dtype, device=device)
    for row, number, up in ups:
        column = sum(down.shape[0] for down in downs[:number])
        whole[row : row + up.shape[0], column : column + up.shape[1]] = up
    return torch.cat(downs), whole
