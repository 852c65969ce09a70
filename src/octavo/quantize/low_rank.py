"""A weight's largest directions, taken out into a branch of 16 bits, so that what is rounded is small.

Source: Li et al. 2025, SVDQuant (arXiv 2411.05007). FP8 rounds weights and inputs relative to their size, so both
errors of a product grow with Σ w² E[x²]: the branch is the best approximation of the weight in that measure.
"""

import torch
from torch import Tensor


def low_rank_branch(weight: Tensor, square: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation up · down of `weight`, columns weighed by the inputs' mean squares.

    Args:
        weight: [N, K], any floating dtype.
        square: [K], mean of x² over the inputs.
        rank: of the branch; no more than min(N, K) is used.

    Returns:
        down [rank, K] and up [N, rank] in weight's dtype.
    """
    N, K = weight.shape
    values = weight.double()
    # A channel that never spoke must not be divided by; a millionth of the largest is as good as silence.
    size = square.double().clamp_min(1e-12 * float(square.amax().clamp_min(1e-30))).sqrt()
    weighed = values * size
    rank = min(rank, N, K)
    # The smaller Gram matrix's eigenvectors are the singular vectors on its side.
    if N <= K:
        up = torch.linalg.eigh(weighed @ weighed.t()).eigenvectors[:, -rank:]
        down = up.t() @ values
    else:
        vectors = torch.linalg.eigh(weighed.t() @ weighed).eigenvectors[:, -rank:]
        up, down = weighed @ vectors, vectors.t() / size
        # 16 bits hold neither very large nor very small numbers: let both factors be of one size.
        balance = (up.norm(dim=0) / down.norm(dim=1).clamp_min(1e-30)).sqrt().clamp_min(1e-30)
        up, down = up / balance, down * balance[:, None]
    return down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous()
