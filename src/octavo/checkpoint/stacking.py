"""Scales and low-rank branches of a layer that is made of several pieces of a file, one upon the other."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.checkpoint.octavo_form import LowRank
from octavo.checkpoint.tensors import TensorFile
from octavo.errors import UnsupportedFormatError
from octavo.fp8.scale import Block


class ScaledRows(NamedTuple):
    """Rows start to stop of one piece, and the scale of the whole piece."""

    scale: Tensor  # [] or [rows of the piece, 1] or by block
    block: Block | None  # where scales are by block
    start: int
    stop: int
    ends: bool  # whether `stop` is where the piece ends


class Stretch(NamedTuple):
    """Rows start to stop of one piece, and the branch of the whole piece."""

    branch: LowRank | None
    start: int
    stop: int


def stack_scales(parts: Sequence[ScaledRows], columns: int, what: str) -> tuple[Tensor, Block | None]:
    """The scale of the whole with what shares one, without loss and as coarse as the parts allow.

    Args:
        parts: of the matrix, from above.
        columns: of the matrix.
        what: its name, for the error.

    Returns:
        [] where one number serves all rows; [rows, 1]; or scales by block with that block. Where cuts run inside of
        blocks, or parts are scaled in different ways, blocks become one row high.

    Raises:
        UnsupportedFormatError: blocks of different widths.
    """
    blocks = {part.block for part in parts if part.block is not None}
    if not blocks:
        scales = [part.scale if part.scale.ndim == 0 else part.scale[part.start : part.stop] for part in parts]
        if all(scale.ndim == 0 and scale == scales[0] for scale in scales):
            return scales[0], None
        rows = [scale.expand(part.stop - part.start, 1) for scale, part in zip(scales, parts, strict=True)]
        return torch.cat(rows), None
    if len({width for _, width in blocks}) > 1:
        raise UnsupportedFormatError(
            f"The pieces of '{what}' have scales by blocks of different widths, {sorted(blocks)}. "
            "Quantize the model again, with one size of blocks."
        )
    height, width = next(iter(blocks))
    if len(blocks) == 1 and all(_between_blocks(part, height, part is parts[-1]) for part in parts):
        return torch.cat([part.scale[part.start // height : -(-part.stop // height)] for part in parts]), (
            height,
            width,
        )
    across = math.ceil(columns / width)
    return torch.cat([_by_row(part, across) for part in parts]), (1, width)


def _between_blocks(part: ScaledRows, height: int, last: bool) -> bool:
    whole_below = part.stop % height == 0 or (last and part.ends)
    return part.block is not None and part.start % height == 0 and whole_below


def _by_row(part: ScaledRows, across: int) -> Tensor:
    """[rows, blocks across], each row with the scales of its own."""
    if part.block is not None:
        return part.scale.repeat_interleave(part.block[0], 0)[part.start : part.stop]
    scale = part.scale if part.scale.ndim == 0 else part.scale[part.start : part.stop]
    return scale.expand(part.stop - part.start, across)


def stack_branches(
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
