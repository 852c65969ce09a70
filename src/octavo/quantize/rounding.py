"""Rounding of a weight by the inputs it will meet: columns still to come make up for the errors of those rounded.

Source: Frantar et al. 2023, GPTQ (arXiv 2210.17323), here on the grids of FP8. What is minimised is
E |(W - Q) x|² = tr((W - Q) C (W - Q)ᵀ), with C the inputs' covariance.
"""

import torch
from torch import Tensor

from octavo.fp8.formats import Fp8Format
from octavo.fp8.scale import Block, Scaled, spread

COLUMNS = 128  # rounded before the rest of the weight hears of it


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
    square = covariance.diagonal()
    # Channels that never spoke: any weight is right, so they are rounded to nearest and pass nothing on.
    unit = torch.where(square > 0, square, 1.0).double().sqrt()
    correlation = covariance.double() / unit / unit[:, None]
    correlation += torch.eye(K, dtype=torch.float64, device=weight.device) * torch.where(square > 0, damping, 1.0)
    values = weight.double() * unit  # errors in units of their effect

    # Those with most at stake are rounded first, while there are many left to make up for them.
    order = torch.argsort((values**2).sum(0), descending=True, stable=True)
    values, unit = values[:, order], unit[order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    each = scale.expand(N, K) if block is None else spread(scale, (N, K), block)
    each = each.double()[:, order]

    q = torch.empty(N, K, dtype=fmt.dtype, device=weight.device)
    for start in range(0, K, COLUMNS):
        stop = min(start + COLUMNS, K)
        errors = torch.empty(N, stop - start, dtype=torch.float64, device=weight.device)
        for column in range(start, stop):
            value = values[:, column]
            step = each[:, column] * unit[column]
            code = (value / step).float().clamp(-fmt.max, fmt.max).to(fmt.dtype)
            error = (value - code.double() * step) / upper[column, column]
            values[:, column + 1 : stop] -= error[:, None] * upper[column, column + 1 : stop]
            errors[:, column - start] = error
            q[:, column] = code
        values[:, stop:] -= errors @ upper[start:stop, stop:]
    # Indexing FP8 needs bytes.
    codes = q.view(torch.uint8)[:, torch.argsort(order)].contiguous().view(fmt.dtype)
    return Scaled(codes, scale, block)


def expected_error(difference: Tensor, covariance: Tensor) -> Tensor:
    """E |difference · x|² for a difference of weights [N, K] and inputs of this covariance [K, K]: one number."""
    return ((difference.double() @ covariance.double()) * difference.double()).sum()
