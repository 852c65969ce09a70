"""Rows into 8 bits in one pass over memory.

Plain definitions: `octavo.fp8.scale.quantize_input` for e4m3fn, `octavo.fp8.int8.quantize_int8` for INT8.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.fp8.formats import E4M3FN
from octavo.fp8.scale import Scaled

BLOCK = 1024  # columns at once


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rows are rounded to."""

    dtype: torch.dtype
    max: float


E4M3 = Rounding(E4M3FN.dtype, E4M3FN.max)
INT8 = Rounding(torch.int8, 127.0)


@triton.jit  # type: ignore[untyped-decorator]
def _e4m3fn_code(x, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 → the byte of the nearest e4m3fn number, ties to even, by integers: one result on every device."""
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    # Keep 3 of 23 bits after the point, rounding by carry, and set the exponent's bias to 7 from 127.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2⁻⁶ the code counts steps of 2⁻⁹; added to 2²³, a number is rounded to a whole one.
    steps = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(size < 0.015625, steps, normal)
    return tl.where(x < 0, code | 0x80, code).to(tl.uint8)


@triton.jit  # type: ignore[untyped-decorator]
def _int8_code(x, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 → the nearest whole number, ties to even: so a number is rounded when added to 1.5 · 2²³."""
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_rows(  # type: ignore[no-untyped-def]
    x,
    q,
    scale,
    given,
    columns,
    stride,
    GIVEN: tl.constexpr,
    EACH: tl.constexpr,
    INTEGER: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    if GIVEN:
        row_scale = tl.load(given + row * EACH)
    else:
        sizes = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            inside = start + offsets < columns
            part = tl.load(x + row * stride + start + offsets, mask=inside, other=0.0).to(tl.float32)
            sizes = tl.maximum(sizes, tl.abs(part))
        row_scale = tl.max(sizes, axis=0) / LARGEST
        row_scale = tl.where(row_scale > 0, row_scale, 1.0)
    tl.store(scale + row, row_scale)
    # Without a scale given, the row is in the cache now.
    for start in range(0, columns, BLOCK):
        inside = start + offsets < columns
        part = tl.load(x + row * stride + start + offsets, mask=inside, other=0.0).to(tl.float32) / row_scale
        code = _int8_code(part, LARGEST) if INTEGER else _e4m3fn_code(part, LARGEST)
        tl.store(q + row * columns + start + offsets, code, mask=inside)


def quantize_rows(x: Tensor, scale: Tensor | None = None, fmt: Rounding = E4M3) -> Scaled:
    """x [M, K] → 8-bit [M, K] and scales [M, 1] float32: `scale`, [] or [M, 1], where given, else each row's own."""
    rows, columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    q = torch.empty(rows, columns, dtype=fmt.dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    codes = q if fmt is INT8 else q.view(torch.uint8)
    if rows:
        _quantize_rows[(rows,)](
            x, codes, scales, scales if scale is None else scale, columns, x.stride(0),
            GIVEN=scale is not None, EACH=int(scale is not None and scale.ndim > 0), INTEGER=fmt is INT8,
            LARGEST=fmt.max, BLOCK=BLOCK,
        )  # fmt: skip
    return Scaled(q, scales)
