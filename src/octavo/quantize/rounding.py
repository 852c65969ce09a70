"""Rounding of a weight by the inputs it will meet: columns still to come make up for the errors of those rounded.

Source: Frantar et al. 2023, GPTQ (arXiv 2210.17323), here on the grids of FP8. What is minimised is
E |(W - Q) x|² = tr((W - Q) C (W - Q)ᵀ), with C the inputs' covariance.
"""

import torch
from torch import Tensor

from octavo.fp8.formats import Fp8Format
from octavo.fp8.scale import Block, Scaled

COLUMNS = 128  # rounded before the rest of the weight hears of it
WIDEST_IN_FLOAT64 = 6144  # channels; of SD3.5 Large's 9728 a matrix would take 757 MB, and two are needed


def gptq(
    weight: Tensor,
    covariance: Tensor,
    scale: Tensor,
    fmt: Fp8Format,
    damping: float = 0.05,
    block: Block | None = None,
) -> Scaled:
    """Round `weight` [N, K] so that its product with inputs of this covariance changes little.

    Args:
        weight: finite, any floating dtype.
        covariance: [K, K], mean of x xᵀ over the inputs, not centred.
        scale: [], [N, 1] or by block, of the result.
        fmt: the format of the result.
        damping: added to the diagonal of the covariance after every channel was brought to mean square 1; the larger,
            the nearer to rounding to nearest. Relative to each channel, so that outliers do not drown the others.
        block: rows and columns that share a scale, where scales are by block.

    Returns:
        On the same grid, an expected squared error of the product no larger than nearest rounding's in all but
        contrived cases.
    """
    N, K = weight.shape
    dtype = torch.float64 if K <= WIDEST_IN_FLOAT64 else torch.float32
    square = covariance.diagonal()
    # Channels that never spoke: any weight is right, so they are rounded to nearest and pass nothing on.
    unit = torch.where(square > 0, square, 1.0).to(dtype).sqrt()
    correlation = covariance.to(dtype, copy=True)
    correlation /= unit
    correlation /= unit[:, None]
    correlation.diagonal().add_(torch.where(square > 0, damping, 1.0))
    values = weight.to(dtype) * unit  # errors in units of their effect

    # Those with most at stake are rounded first, while there are many left to make up for them.
    order = torch.argsort((values**2).sum(0), descending=True, stable=True)
    values, unit = values[:, order], unit[order]
    # What is wanted is the upper factor U of the inverse, inverse = Uᵀ U. With the channels in reverse the correlation
    # is L Lᵀ, and U is L⁻¹ reversed back: one factorization instead of three, rows of U being made as they are needed.
    # As few of these matrices as possible live at a time.
    back = order.flip(0)
    correlation = correlation[back]
    correlation = correlation[:, back]
    lower = torch.linalg.cholesky(correlation)
    del correlation
    channels = order.tolist()

    q = torch.empty(N, K, dtype=fmt.dtype, device=weight.device)
    for start in range(0, K, COLUMNS):
        stop = min(start + COLUMNS, K)
        upper = _rows_of_factor(lower, start, stop)
        errors = torch.empty(N, stop - start, dtype=dtype, device=weight.device)
        for i, column in enumerate(range(start, stop)):
            value = values[:, column]
            step = _scale_of(scale, channels[column], N, block).to(dtype) * unit[column]
            code = (value / step).float().clamp(-fmt.max, fmt.max).to(fmt.dtype)
            error = (value - code.to(dtype) * step) / upper[i, i]
            values[:, column + 1 : stop] -= error[:, None] * upper[i, i + 1 : stop - start]
            errors[:, i] = error
            q[:, column] = code
        values[:, stop:] -= errors @ upper[:, stop - start :]
    # Indexing FP8 needs bytes.
    codes = q.view(torch.uint8)[:, torch.argsort(order)].contiguous().view(fmt.dtype)
    return Scaled(codes, scale, block)


def _rows_of_factor(lower: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of U from its column `start` on, for U = L⁻¹ with rows and columns in reverse."""
    first, last = len(lower) - stop, len(lower) - start  # of L⁻¹
    unit = torch.zeros(last - first, last, dtype=lower.dtype, device=lower.device)
    unit[:, first:].fill_diagonal_(1.0)
    rows: Tensor = torch.linalg.solve_triangular(lower[:last, :last], unit, upper=False, left=False)
    return rows.flip((0, 1))


def _scale_of(scale: Tensor, channel: int, rows: int, block: Block | None) -> Tensor:
    """The scale of each row [N], or of all [1], in one column of the weight."""
    if block is None:
        return scale.reshape(-1)
    return scale[:, channel // block[1]].repeat_interleave(block[0])[:rows]


def expected_error(difference: Tensor, covariance: Tensor) -> Tensor:
    """E |difference · x|² for a difference of weights [N, K] and inputs of this covariance [K, K]: one number."""
    return ((difference.double() @ covariance.double()) * difference.double()).sum()
