"""Rows into FP8 in one pass over memory. Plain definition: `octavo.fp8.scale.quantize_input`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.fp8.formats import E4M3FN
from octavo.fp8.scale import Scaled

BLOCK = 1024  # columns at once


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
def _quantize_rows(  # type: ignore[no-untyped-def]
    x, q, scale, given, columns, stride, GIVEN: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    if GIVEN:
        row_scale = tl.load(given)
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
        tl.store(q + row * columns + start + offsets, _e4m3fn_code(part, LARGEST), mask=inside)


def quantize_rows(x: Tensor, scale: Tensor | None = None) -> Scaled:
    """x [M, K] → e4m3fn [M, K] and scales [M, 1] float32: `scale`, shape [], where given, else each row's own."""
    rows, columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    q = torch.empty(rows, columns, dtype=E4M3FN.dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        _quantize_rows[(rows,)](
            x, q.view(torch.uint8), scales, scales if scale is None else scale, columns, x.stride(0),
            GIVEN=scale is not None, LARGEST=E4M3FN.max, BLOCK=BLOCK,
        )  # fmt: skip
    return Scaled(q, scales)
