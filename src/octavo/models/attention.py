"""One attention call for every model: the seam that other attention kernels and sequence parallelism use.

Plain definition: softmax(q k^T · scale + bias) v, by `torch.nn.functional.scaled_dot_product_attention`, which picks
flash, memory-efficient or math kernels itself and never holds the [L, L] matrix where it can avoid it.
"""

import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Multi-head attention of tokens that keep their heads on the third axis.

    Args:
        q: queries [B, L, H, E], any strides.
        k: keys [B, M, H, E].
        v: values [B, M, H, E].
        bias: added to the logits before the softmax, broadcastable to [B, H, L, M].
        causal: each query sees itself and what stands before it.
        scale: factor of the logits; 1/sqrt(E) when not given.

    Returns:
        [B, L, H·E], heads joined again.
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2).flatten(2)
