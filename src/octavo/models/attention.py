"""One attention call for every model: the seam that other attention kernels and sequence parallelism use.

Plain definition: softmax(q k^T · scale + bias) v, by `torch.nn.functional.scaled_dot_product_attention`, which picks
flash, memory-efficient or math kernels itself and never holds the [L, L] matrix where it can avoid it. Few tokens in
float32 on a CPU are the exception: there the products are made in so many words, see `_few_tokens`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries, keys and values [B, L or M, H, E], any strides → [B, L, H·E].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

FEW = 512 * 512  # logits of one head, up to which that is faster
AT_ONCE = 256 * 1024  # logits that are held at once: as many as a core's cache takes


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
    if (
        bias is None
        and not causal
        and q.device.type == "cpu"
        and q.dtype == torch.float32
        and q.shape[1] * k.shape[1] <= FEW
        and not torch.is_grad_enabled()
    ):
        return _few_tokens(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2).flatten(2)


def _few_tokens(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The definition, written out, some heads at a time.

    torch's flash kernel for CPUs works on blocks of 32 rows: with 104 tokens it takes four times as long as this, with
    410 tokens 1.4 times (one core of an AMD EPYC of the Zen 5 kind).
    """
    batch, length, heads, width = q.shape
    # In rows: of columns, as a VAE's channels come, products of batches take many times as long.
    queries, keys, values = (x.transpose(1, 2).reshape(batch * heads, -1, width).contiguous() for x in (q, k, v))
    keys = keys.transpose(1, 2)
    out = torch.empty_like(queries)
    step = max(AT_ONCE // (length * k.shape[1]), torch.get_num_threads())
    for start in range(0, batch * heads, step):
        some = slice(start, start + step)
        logits = torch.baddbmm(q.new_empty(()), queries[some], keys[some], beta=0, alpha=scale)
        torch.bmm(logits.softmax(dim=-1), values[some], out=out[some])
    return out.view(batch, heads, length, width).transpose(1, 2).flatten(2)
