"""Attention whose products have factors of eight bits, in one pass over the keys.

Plain definition: `octavo.fp8.attention.attention_8bit`, whose docstring says what is rounded how. Two steps: q, k and v
are brought into 8 bits in the order in which tensor cores take them (values transposed, for a product in FP8 sums over
what lies side by side); then each program goes through all keys for some queries of one head, as in Dao 2023 (arXiv
2307.08691).

B batch, L queries, M keys, H heads, E width of a head.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.fp8.attention import FP8, LOG2E, Rounded, smoothed_by
from octavo.fp8.formats import E4M3FN
from octavo.fp8.kernels.launch import on
from octavo.fp8.kernels.quantize import code_of, native, row_scale_of


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program holds."""

    queries: int
    keys: int  # at once; they share a scale
    warps: int
    stages: int  # loads in flight


# By compute capability, from which on each holds.
TILES = {(9, 0): Tile(128, 128, 8, 3), (8, 9): Tile(128, 64, 4, 3), (0, 0): Tile(128, 64, 4, 2)}
WIDTHS = (32, 64, 128)  # of heads that it takes


@triton.jit  # type: ignore[untyped-decorator]
def _round(  # type: ignore[no-untyped-def]
    x, given, codes, scales, length, padded, heads, batch_stride, token_stride, head_stride, fit,
    KIND: tl.constexpr, INTEGER: tl.constexpr, NATIVE: tl.constexpr, LARGEST: tl.constexpr,
    TOKENS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Tokens of one head. KIND 0, queries: a scale a row, times `fit`. 1, keys: `given` taken off, one scale for all.
    2, values: by the scales `given`, transposed. Beyond the last token: zeros. NaN among queries or keys is in their
    scale, for INT8 has none."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, e = block * TOKENS + tl.arange(0, TOKENS), tl.arange(0, E)
    start = x + (head // heads) * batch_stride + (head % heads) * head_stride
    inside = (token < length)[:, None]
    part = tl.load(start + token.to(tl.int64)[:, None] * token_stride + e[None, :], mask=inside, other=0.0)
    part = part.to(tl.float32)
    if KIND == 2:
        scale = tl.load(given + head * E + e)
        code = code_of(part / scale[None, :], False, NATIVE, LARGEST)
        tl.store(codes + head * E * padded + e[None, :].to(tl.int64) * padded + token[:, None], code)
    else:
        if KIND == 1:
            part = tl.where(inside, part - tl.load(given + head * E + e)[None, :], 0.0)
        spoilt = tl.max((part != part).to(tl.int32), axis=1)
        amax = tl.max(tl.abs(part), axis=1)
        if KIND == 1:
            scale = row_scale_of(tl.max(amax, axis=0), tl.max(spoilt, axis=0), True, LARGEST)
            tl.store(scales + head * tl.num_programs(0) + block, scale)
            code = code_of(part / scale, INTEGER, NATIVE, LARGEST)
        else:
            scale = row_scale_of(amax, spoilt, True, LARGEST)
            tl.store(scales + head * padded + token, scale * fit)
            code = code_of(part / scale[:, None], INTEGER, NATIVE, LARGEST)
        tl.store(codes + (head * padded + token)[:, None] * E + e[None, :], code)


@triton.jit  # type: ignore[untyped-decorator]
def _blocks(  # type: ignore[no-untyped-def]
    q, q_scale, largest, total, summed, k, k_scale, v, v_token_stride, keys_in_all, padded, first, last,
    MASKED: tl.constexpr, INTEGER: tl.constexpr, WEIGHTS: tl.constexpr, NATIVE: tl.constexpr,
    STRETCH: tl.constexpr, E: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Go on through blocks `first` to `last` of the keys; only the very last one can need a mask."""
    e = tl.arange(0, E)
    for block in range(first, last):
        key = block * KEYS + tl.arange(0, KEYS)
        code = tl.load(k + key[None, :] * E + e[:, None])
        if INTEGER:
            logits = tl.dot(q, code, out_dtype=tl.int32).to(tl.float32)
        else:
            logits = tl.dot(q, code.to(tl.float8e4nv, bitcast=True), out_dtype=tl.float32)
        if MASKED:
            logits = tl.where((key < keys_in_all)[None, :], logits, -float("inf"))
        scale = q_scale * tl.load(k_scale + block)
        before = largest
        largest = tl.maximum(largest, tl.max(logits, axis=1) * scale)
        p = tl.exp2(logits * scale[:, None] - (largest - STRETCH)[:, None])
        shrink = tl.exp2(before - largest)
        total = total * shrink + tl.sum(p, axis=1)
        summed = summed * shrink[:, None]
        if WEIGHTS:
            # They are never beyond the largest number.
            codes = p.to(tl.float8e4nv) if NATIVE else code_of(p, False, False, 448.0)
            weights = codes.to(tl.float8e4nv, bitcast=True)
            values = tl.load(v + e[None, :] * padded + key[:, None]).to(tl.float8e4nv, bitcast=True)
        else:
            values = v + key[:, None] * v_token_stride + e[None, :]
            values = tl.load(values, mask=(key < keys_in_all)[:, None], other=0.0) if MASKED else tl.load(values)
            weights = p.to(values.dtype)
        summed = tl.dot(weights, values, summed, out_dtype=tl.float32)
    return largest, total, summed


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, q_scale, k, k_scale, v, v_scale, out, queries, keys, q_padded, k_padded, heads,
    v_batch_stride, v_token_stride, v_head_stride,
    INTEGER: tl.constexpr, WEIGHTS: tl.constexpr, NATIVE: tl.constexpr, STRETCH: tl.constexpr,
    E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row, e = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, E)
    code = tl.load(q + (head * q_padded + row)[:, None] * E + e[None, :])
    if not INTEGER:
        code = code.to(tl.float8e4nv, bitcast=True)
    scale = tl.load(q_scale + head * q_padded + row)
    blocks, whole = k_padded // KEYS, keys // KEYS
    k += head * k_padded * E
    k_scale += head * blocks
    if WEIGHTS:
        v += head * E * k_padded
    else:
        v += (head // heads) * v_batch_stride + (head % heads) * v_head_stride

    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, E], tl.float32)
    largest, total, summed = _blocks(
        code, scale, largest, total, summed, k, k_scale, v, v_token_stride, keys, k_padded, 0, whole,
        False, INTEGER, WEIGHTS, NATIVE, STRETCH, E, KEYS,
    )  # fmt: skip
    largest, total, summed = _blocks(
        code, scale, largest, total, summed, k, k_scale, v, v_token_stride, keys, k_padded, whole, blocks,
        True, INTEGER, WEIGHTS, NATIVE, STRETCH, E, KEYS,
    )  # fmt: skip

    summed = summed / total[:, None]
    if WEIGHTS:
        summed *= tl.load(v_scale + head * E + e)[None, :]
    place = ((head // heads) * queries + row)[:, None] * (heads * E) + (head % heads) * E + e[None, :]
    tl.store(out + place, summed.to(out.dtype.element_ty), mask=(row < queries)[:, None])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rounded: Rounded = FP8,
    scale: float | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """`attention_8bit` with as many keys to a scale as `tile` has: [B, L, H, E] and twice [B, M, H, E] → [B, L, H·E].

    Args:
        q, k, v: any strides but 1 along E, in 16 bits (or float32, in the interpreter); M is not 0.
        tile: what suits the device when not given.
    """
    with on(q.device):
        return _launch(q, k, v, rounded, scale, tile_for(q.device) if tile is None else tile)


def _launch(q: Tensor, k: Tensor, v: Tensor, rounded: Rounded, scale: float | None, tile: Tile) -> Tensor:
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    converts = native(q.device)

    def codes(x: Tensor, kind: int, each: int, given: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
        length = x.shape[1]
        blocks = triton.cdiv(length, each)
        integers = rounded.integers and kind < 2
        shape = (batch * heads, width, blocks * each) if kind == 2 else (batch * heads, blocks * each, width)
        made = torch.empty(shape, dtype=torch.int8 if integers else torch.uint8, device=x.device)
        scales = torch.empty(batch * heads, blocks * (each if kind == 0 else 1), device=x.device)
        _round[(blocks, batch * heads)](
            x, scales if given is None else given, made, scales, length, blocks * each, heads, x.stride(0), x.stride(1),
            x.stride(2), (width**-0.5 if scale is None else scale) * LOG2E,
            KIND=kind, INTEGER=integers, NATIVE=converts, LARGEST=127.0 if integers else E4M3FN.max, TOKENS=each,
            E=width, num_warps=4,
        )  # fmt: skip
        return made, scales if given is None or kind == 1 else given, blocks * each

    out = torch.empty(batch, queries, heads * width, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    q_codes, q_scale, q_padded = codes(q, 0, tile.queries)
    k_codes, k_scale, k_padded = codes(k, 1, tile.keys, smoothed_by(k))
    v_codes, v_scale, strides = v, q_scale, (v.stride(0), v.stride(1), v.stride(2))
    if rounded.weights:
        # Not v.abs().amax(): that would write all of them once more.
        by_channel = torch.linalg.vector_norm(v, math.inf, dim=1).float() / E4M3FN.max
        v_codes, v_scale, _ = codes(v, 2, tile.keys, torch.where(by_channel == 0, 1.0, by_channel))
    _attend[(q_padded // tile.queries, batch * heads)](
        q_codes, q_scale, k_codes, k_scale, v_codes, v_scale, out, queries, keys, q_padded, k_padded, heads, *strides,
        INTEGER=rounded.integers, WEIGHTS=rounded.weights, NATIVE=converts, STRETCH=rounded.stretch,
        E=width, QUERIES=tile.queries, KEYS=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def tile_for(device: torch.device) -> Tile:
    """The tile for a device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return next(tile for least, tile in TILES.items() if capability >= least)
