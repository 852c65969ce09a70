"""Queries, keys and values of all streams, normed and laid out for attention: one pass a stream, nothing joined after.

Plain definition: `octavo.fp8.modulate.heads`. A program takes one head of some tokens: its queries, keys and values.

B batch, L tokens, H heads, E numbers of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.fp8.kernels.launch import in_rows, on
from octavo.fp8.modulate import Stream

TOKENS = 32  # of a program
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _heads(  # type: ignore[no-untyped-def]
    qkv, qkv_batch, qkv_token, of_q, of_k, out,
    tokens, first, length, heads, E, eps,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, e = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (e < E)[None, :]
    source = qkv + batch * qkv_batch + token.to(tl.int64)[:, None] * qkv_token + head * E + e[None, :]
    target = out + ((batch * heads + head) * length + first + token)[:, None] * E + e[None, :]
    section = tl.num_programs(2).to(tl.int64) * heads * length * E  # of all queries, all keys, all values
    for part in tl.static_range(3):
        x = tl.load(source + part * heads * E, mask=inside, other=0.0)
        if (part == 0 and NORM_Q) or (part == 1 and NORM_K):
            weight = tl.load((of_q if part == 0 else of_k) + e, mask=e < E, other=0.0).to(tl.float32)
            wide = x.to(tl.float32)
            size = tl.rsqrt(tl.sum(wide * wide, axis=1) / E + eps)
            x = (wide * size[:, None] * weight[None, :]).to(x.dtype)
        tl.store(target + part * section, x, mask=inside)


def heads(*streams: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """Each stream's qkv [B, L, 3·H·E] → three [B, ΣL, H, E], views of [B, H, ΣL, E]. See the definition."""
    first = streams[0].qkv
    B, H = first.shape[0], streams[0].heads
    E, length = first.shape[2] // (3 * H), sum(stream.qkv.shape[1] for stream in streams)
    out = torch.empty(3, B, H, length, E, dtype=first.dtype, device=first.device)
    start = 0
    for qkv, count, of_q, of_k, eps in streams:
        assert count == H
        assert qkv.shape[2] == 3 * H * E, f"{list(qkv.shape)} is no stream beside {list(first.shape)}"
        source, tokens = in_rows(qkv), qkv.shape[1]
        if B * tokens:
            with on(source.device):
                _heads[(triton.cdiv(tokens, TOKENS), H, B)](
                    source, source.stride(0), source.stride(1),
                    source if of_q is None else of_q, source if of_k is None else of_k, out,
                    tokens, start, length, H, E, eps,
                    NORM_Q=of_q is not None, NORM_K=of_k is not None, TOKENS=TOKENS,
                    BLOCK=triton.next_power_of_2(E), num_warps=WARPS,
                )  # fmt: skip
        start += tokens
    q, k, v = out.transpose(2, 3).unbind(0)
    return q, k, v
