"""The stress twin: the same function as a trained MMDiT, with the outliers that large models have.

A small model has hardly any outliers of its own, so it barely tells one way of quantizing from another. Its twin is
rescaled at every seam (`quantize.seams`), so that it computes the same numbers, up to rounding, from weights and
activations of very unlike sizes. The factors are lognormal: a few channels stand far out, as Dettmers et al. 2022
(arXiv 2208.07339) and Xiao et al. 2022 (arXiv 2211.10438) found in large transformers.
"""

import torch
from torch import Tensor

from octavo.models import MMDiT
from octavo.quantize.seams import block_seams, final_seams, head_rows

SPREAD = 1.5  # of the factors' logarithm: one channel in 44 is beyond 20 times the median, one in 740 beyond 90


@torch.no_grad()
def put_outliers_in(mmdit: MMDiT, *, spread: float = SPREAD, seed: int = 0) -> None:
    """Rescale `mmdit`, in place, without changing what it computes.

    Args:
        mmdit: not quantized; best in float32, since 16 bits round what is rescaled once more.
        spread: of the factors' logarithm; 0 changes nothing.
        seed: of the factors.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> Tensor:
        return torch.exp(spread * torch.randn(count, generator=generator)).to(mmdit.pos_embed.device)

    for block in mmdit.joint_blocks:
        for seam in block_seams(block):
            seam.apply(factors(seam.channels))
        for rows in head_rows(block):
            s = factors(mmdit.config.heads)
            # Never smaller: qk-norm adds its eps to the mean square, which a small factor would bring to the fore.
            rows.multiply((s / s.amin()).repeat_interleave(mmdit.config.width // mmdit.config.heads))
    for seam in final_seams(mmdit.final_layer):
        seam.apply(factors(seam.channels))
