"""GELU of rows straight into 8 bits. Plain definition: `octavo.fp8.modulate.gelu`.

GELU, in its tanh form, is x / (1 + exp(-2u)) with u = √(2/π) (x + 0.044715 x³). It rises wherever it is positive, so
the largest value of a row comes from the row's largest number, and one pass over x without exponentials finds it; only
a row that ends below the depth of GELU's dip has to be searched. Rows are long (four widths), so they are taken in
parts and read twice, the second time from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.fp8.kernels.launch import given_scale, in_rows, on, warps
from octavo.fp8.kernels.quantize import ROUNDINGS, code_of, native, row_scale_of
from octavo.fp8.scale import Form, Scaled

BLOCK = 2048  # columns at once: 9728 of them are five parts, 6144 are three
DIP = tl.constexpr(0.1701)  # a little more than GELU ever falls below 0


@triton.jit
def _growth(x):  # type: ignore[no-untyped-def]
    """1 + exp(-2u): what x is divided by."""
    return 1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit  # type: ignore[untyped-decorator]
def _gelu_rows(  # type: ignore[no-untyped-def]
    x, q, scales, given, columns, stride,
    INTEGER: tl.constexpr, GIVEN: tl.constexpr, EACH: tl.constexpr, NATIVE: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    if GIVEN:
        scale = tl.load(given + row * EACH)
    else:
        tops = tl.zeros([BLOCK], tl.float32)
        spoilt = tl.zeros([BLOCK], tl.int32)
        for start in range(0, columns, BLOCK):
            inside = start + offsets < columns
            part = tl.load(x + row * stride + start + offsets, mask=inside, other=0.0).to(tl.float32)
            tops = tl.maximum(tops, part)
            spoilt = tl.maximum(spoilt, ((part - part) != 0.0).to(tl.int32))  # NaN, and infinity, which GELU makes NaN
        top = tl.max(tops, axis=0)
        amax = top / _growth(top)
        if amax < DIP:
            sizes = tl.zeros([BLOCK], tl.float32)
            for start in range(0, columns, BLOCK):
                inside = start + offsets < columns
                part = tl.load(x + row * stride + start + offsets, mask=inside, other=0.0).to(tl.float32)
                sizes = tl.maximum(sizes, tl.abs(part / _growth(part)))
            amax = tl.max(sizes, axis=0)
        scale = row_scale_of(amax, tl.max(spoilt, axis=0), INTEGER, LARGEST)
        tl.store(scales + row, scale)
    for start in range(0, columns, BLOCK):
        inside = start + offsets < columns
        part = tl.load(x + row * stride + start + offsets, mask=inside, other=0.0).to(tl.float32)
        code = code_of(part / (_growth(part) * scale), INTEGER, NATIVE, LARGEST)
        tl.store(q + row * columns + start + offsets, code, mask=inside)


def gelu(x: Tensor, form: Form, input_scale: Tensor | None = None) -> Scaled:
    """x [..., K] → rows of 8 bits [M, K] with their scales. See the definition."""
    x = in_rows(x.reshape(-1, x.shape[-1]))
    (M, K), rounding = x.shape, ROUNDINGS[form]
    q = torch.empty(M, K, dtype=rounding.dtype, device=x.device)
    given = given_scale(form, input_scale)
    scales = torch.empty(M, 1, dtype=torch.float32, device=x.device) if given is None else given
    block = min(BLOCK, triton.next_power_of_2(K))
    if M:
        with on(x.device):
            _gelu_rows[(M,)](
                x, q.view(torch.uint8) if form == "e4m3fn" else q, scales, scales, K, x.stride(0),
                INTEGER=form == "int8", GIVEN=given is not None, EACH=int(given is not None and given.ndim > 0),
                NATIVE=native(x.device), LARGEST=rounding.max, BLOCK=block, num_warps=warps(block),
            )  # fmt: skip
    return Scaled(q, scales)
