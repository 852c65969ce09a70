"""Rows into 8 bits in one pass over memory.

Plain definitions: `octavo.fp8.scale.quantize_input` for e4m3fn, `octavo.fp8.int8.quantize_int8` for INT8. One program
takes one row, in parts; without a given scale it reads the row twice, the second time from the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.fp8.formats import E4M3FN
from octavo.fp8.kernels.launch import given_scale, in_rows, on
from octavo.fp8.scale import Form, Scaled

LANE = 8  # columns that a lane takes at once: one load of 16 bytes in 16 bits
SHORT, LONG = 1024, 2048  # columns of a part
LONG_FROM = 4096  # columns of a row from which its parts are long


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rows are rounded to."""

    dtype: torch.dtype
    max: float


ROUNDINGS: Mapping[Form, Rounding] = {
    "e4m3fn": Rounding(E4M3FN.dtype, E4M3FN.max),
    "int8": Rounding(torch.int8, 127.0),
}


@triton.jit  # type: ignore[untyped-decorator]
def code_of(x, INTEGER: tl.constexpr, NATIVE: tl.constexpr, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 → the byte of the nearest number of 8 bits, ties to even, larger ones clamped; NaN stays NaN in e4m3fn.

    NATIVE lets the processor convert, which has an instruction for two numbers from compute capability 8.9 on; by
    integers it takes some twenty, with one result on every device.
    """
    if INTEGER:
        # Added to 1.5 · 2²³ a number is rounded to a whole one.
        code = ((tl.minimum(tl.maximum(x, -LARGEST), LARGEST) + 12582912.0) - 12582912.0).to(tl.int8)
    elif NATIVE:
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        size = tl.minimum(tl.abs(x), LARGEST)
        bits = size.to(tl.int32, bitcast=True)
        # Keep 3 of 23 bits after the point, rounding by carry, and set the exponent's bias to 7 from 127.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2⁻⁶ the code counts steps of 2⁻⁹; added to 2²³, a number is rounded to a whole one.
        steps = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(size < 0.015625, steps, normal)
        code = tl.where(x < 0, code | 0x80, code)
        code = tl.where(x != x, 0x7F, code).to(tl.uint8)
    return code


@triton.jit  # type: ignore[untyped-decorator]
def row_scale_of(amax, spoilt, INTEGER: tl.constexpr, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of a row from its largest absolute value, and whether it holds NaN (1, else 0)."""
    scale = tl.div_rn(amax, LARGEST)  # as exact as torch's; elsewhere Triton's division may end a unit or two beside it
    scale = tl.where(scale > 0, scale, 1.0)
    if INTEGER:  # no code of its own for NaN
        scale = tl.where(spoilt > 0, float("nan"), scale)
    return scale


@triton.jit  # type: ignore[untyped-decorator]
def store_row(  # type: ignore[no-untyped-def]
    y, inside, offsets, row, columns, out, scales, given,
    FORM: tl.constexpr, GIVEN: tl.constexpr, EACH: tl.constexpr, NATIVE: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Hand on a whole row that is in registers, 0 outside: in FORM 0 as `out` keeps it, in 1 e4m3fn, in 2 INT8."""
    if FORM == 0:
        tl.store(out + row * columns + offsets, y.to(out.dtype.element_ty), mask=inside)
    else:
        if GIVEN:
            scale = tl.load(given + row * EACH)
        else:
            spoilt = tl.max((y != y).to(tl.int32), axis=0)
            scale = row_scale_of(tl.max(tl.abs(y), axis=0), spoilt, FORM == 2, LARGEST)
            tl.store(scales + row, scale)
        tl.store(out + row * columns + offsets, code_of(y / scale, FORM == 2, NATIVE, LARGEST), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_rows(  # type: ignore[no-untyped-def]
    x, q, scales, given, columns, stride,
    GIVEN: tl.constexpr, EACH: tl.constexpr, INTEGER: tl.constexpr, NATIVE: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    if GIVEN:
        row_scale = tl.load(given + row * EACH)
    else:
        sizes = tl.zeros([BLOCK], tl.float32)
        spoilt = tl.zeros([BLOCK], tl.int32)
        for start in range(0, columns, BLOCK):
            inside = start + offsets < columns
            part = tl.load(x + row * stride + start + offsets, mask=inside, other=0.0).to(tl.float32)
            sizes = tl.maximum(sizes, tl.abs(part))
            spoilt = tl.maximum(spoilt, (part != part).to(tl.int32))
        row_scale = row_scale_of(tl.max(sizes, axis=0), tl.max(spoilt, axis=0), INTEGER, LARGEST)
        tl.store(scales + row, row_scale)
    for start in range(0, columns, BLOCK):
        inside = start + offsets < columns
        part = tl.load(x + row * stride + start + offsets, mask=inside, other=0.0).to(tl.float32) / row_scale
        code = code_of(part, INTEGER, NATIVE, LARGEST)
        tl.store(q + row * columns + start + offsets, code, mask=inside)


@cache
def native(device: torch.device) -> bool:
    """Whether the device converts to e4m3fn by itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def part_of(columns: int) -> tuple[int, int]:
    """Columns of a row that are taken at once, and by how many warps.

    More warps a row are fewer rows at once: 16 of 4096 columns, or 8 of 9728, are 128 and 152 KiB in 16 bits on a
    processor that is full, so that the second reading is served from near.
    """
    block = min(LONG if columns > LONG_FROM else SHORT, triton.next_power_of_2(columns))
    return block, max(1, block // (32 * LANE))


def quantize_rows(x: Tensor, scale: Tensor | None = None, form: Form = "e4m3fn") -> Scaled:
    """x [M, K] in `form`, by `scale`, [] or [M, 1] float32, where that is given and for this form; else row by row.

    Returns:
        q [M, K], and the scale as it was given or [M, 1].
    """
    x, rounding, given = in_rows(x), ROUNDINGS[form], given_scale(form, scale)
    rows, columns = x.shape
    q = torch.empty(rows, columns, dtype=rounding.dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if given is None else given
    block, warps = part_of(columns)
    if rows:
        with on(x.device):
            _quantize_rows[(rows,)](
                x, q.view(torch.uint8) if form == "e4m3fn" else q, scales, scales, columns, x.stride(0),
                GIVEN=given is not None, EACH=int(given is not None and given.ndim > 0), INTEGER=form == "int8",
                NATIVE=native(x.device), LARGEST=rounding.max, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return Scaled(q, scales)
