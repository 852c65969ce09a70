"""Attention in eight bits: the definition of its arithmetic, in plain torch.

softmax(q kᵀ · scale) v, where both products have factors of few bits, as tensor cores multiply them twice as fast:

- q is rounded row by row (a row: one query of one head), each with a scale of its own.
- k is rounded block by block of keys. The mean of all keys of a head is taken off first, which changes no softmax, for
  it adds the same number to every logit of a query; what is left is smaller and is rounded by smaller steps.
- Weights p = exp(logit − largest so far) lie in [0, 1]. Rounded to e4m3fn they are stretched by 448, its largest
  number, so that most are normal numbers; their sum is taken before they are rounded.
- v is rounded to e4m3fn channel by channel of a head, the channels being what a sum over keys has in common.

`Rounded` says which of these are e4m3fn, which INT8 and which stay as they are. Keys are gone through in blocks, and
weights are relative to the largest logit so far (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv
2307.08691), because that is what decides how weights are rounded. Smoothing k, scales by block: Zhang et al. 2024
(SageAttention, arXiv 2410.02367; 2411.10958). The kernel is `kernels.attention`.

B batch, L queries, M keys, H heads, E width of a head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.fp8.formats import E4M3FN

LOG2E = math.log2(math.e)
KEYS = 64  # keys that share a scale, and are gone through together


@dataclass(frozen=True, slots=True)
class Rounded:
    """Which numbers are rounded to what."""

    integers: bool  # q and k: INT8, else e4m3fn
    weights: bool  # p and v to e4m3fn; else they keep v's dtype

    @property
    def largest(self) -> float:
        """That q and k are stretched to."""
        return 127.0 if self.integers else E4M3FN.max

    @property
    def stretch(self) -> float:
        """What is added to a weight's exponent before it is rounded."""
        return math.log2(E4M3FN.max) if self.weights else 0.0


FP8 = Rounded(integers=False, weights=True)
INT8 = Rounded(integers=True, weights=False)
INT8_FP8 = Rounded(integers=True, weights=True)


def attention_8bit(
    q: Tensor, k: Tensor, v: Tensor, *, rounded: Rounded = FP8, scale: float | None = None, keys: int = KEYS
) -> Tensor:
    """What the kernel computes, in float32 apart from what it rounds.

    Args:
        q: queries [B, L, H, E], finite.
        k: keys [B, M, H, E].
        v: values [B, M, H, E].
        rounded: which numbers are rounded to what.
        scale: factor of the logits; 1/sqrt(E) when not given.
        keys: that share a scale.

    Returns:
        [B, L, H·E] in q's dtype.
    """
    smooth = k.float() - smoothed_by(k)[:, None]
    each_q, each_k, each_v = (x.transpose(1, 2).float() for x in (q, smooth, v))  # [B, H, L or M, E]
    fit = q.shape[-1] ** -0.5 if scale is None else scale
    q_scale = _scale(each_q.abs().amax(-1, keepdim=True), rounded.largest)
    q_code = _round(each_q / q_scale, rounded)
    v_scale = _scale(each_v.abs().amax(-2, keepdim=True), E4M3FN.max) if rounded.weights else None
    v_code = each_v if v_scale is None else _e4m3fn(each_v / v_scale)

    largest = q_scale.new_full(q_scale.shape, -math.inf)
    total, summed = torch.zeros_like(q_scale), torch.zeros_like(each_q)
    for start in range(0, k.shape[1], keys):
        some = slice(start, start + keys)
        k_scale = _scale(each_k[:, :, some].abs().amax((-1, -2), keepdim=True), rounded.largest)
        k_code = _round(each_k[:, :, some] / k_scale, rounded)
        logits = (q_code @ k_code.mT) * (q_scale * (fit * LOG2E) * k_scale)
        before, largest = largest, torch.maximum(largest, logits.amax(-1, keepdim=True))
        p = torch.exp2(logits - (largest - rounded.stretch))
        shrink = torch.exp2(before - largest)
        total = total * shrink + p.sum(-1, keepdim=True)
        p = _e4m3fn(p) if rounded.weights else p.to(v.dtype).float()
        summed = summed * shrink + p @ v_code[:, :, some]
    out = summed / total
    if v_scale is not None:
        out = out * v_scale
    return out.transpose(1, 2).flatten(2).to(q.dtype)


def smoothed_by(k: Tensor) -> Tensor:
    """What is taken off keys [B, M, H, E]: their mean, [B, H, E] float32."""
    return k.mean(dim=1, dtype=torch.float32)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention in float32, against which errors are measured; arguments and result as of `attention_8bit`."""
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def _scale(amax: Tensor, largest: float) -> Tensor:
    scale = amax / largest
    return torch.where(scale == 0, 1.0, scale)  # NaN stays, and spoils what it is the scale of


def _round(x: Tensor, rounded: Rounded) -> Tensor:
    return x.round().clamp(-127, 127) if rounded.integers else _e4m3fn(x)


def _e4m3fn(x: Tensor) -> Tensor:
    return x.clamp(-E4M3FN.max, E4M3FN.max).to(E4M3FN.dtype).float()
