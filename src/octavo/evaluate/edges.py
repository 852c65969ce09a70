"""Whether a picture follows the edges that it was told to follow."""

import torch.nn.functional as F
from torch import Tensor

WITHIN = 2  # pixels


def edge_agreement(found: Tensor, wanted: Tensor, within: int = WITHIN) -> Tensor:
    """F1 of edges: the harmonic mean of precision and recall, where an edge counts that has one of the other near it.

    Args:
        found, wanted: [B, 1, H, W] of zeros and ones, as `pipeline.edges.canny` gives them.
        within: pixels along either side up to which edges are the same.

    Returns:
        [B] from 0 to 1; 0 where one of them has no edge.
    """

    def share(of: Tensor, near: Tensor) -> Tensor:
        wide = F.max_pool2d(near, 2 * within + 1, stride=1, padding=within)
        return (of * wide).sum((1, 2, 3)) / of.sum((1, 2, 3)).clamp(min=1)

    precision, recall = share(found, wanted), share(wanted, found)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-9)
