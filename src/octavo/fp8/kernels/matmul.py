"""Products with an 8-bit weight, scales and bias applied before the result leaves the registers.

`w8a8` multiplies FP8 by FP8. Plain definition: `octavo.fp8.matmul.plain_w8a8`.
`w8a16` turns codes into 16-bit numbers tile by tile inside the product, for GPUs without FP8 arithmetic, whose memory
traffic and capacity profit all the same. Plain definition: `octavo.fp8.matmul.plain_matmul`.
`int8` multiplies INT8 by INT8, for Ampere's units. Plain definition: `octavo.fp8.int8.int_mm_matmul`.

M rows of x, N outputs, K inputs; a tile is BLOCK_M × BLOCK_N of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.fp8.formats import E4M3FN
from octavo.fp8.kernels.launch import in_rows, on
from octavo.fp8.kernels.quantize import quantize_rows
from octavo.fp8.scale import Scaled

GROUP = 8  # tiles down M that share their part of the weight in the L2 cache
STAGES = 3  # loads in flight


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    x, x_scale, w, w_scale, bias, y,
    M, N, K, x_stride,
    DECODE: tl.constexpr, E4M3: tl.constexpr, INTEGER: tl.constexpr,
    SCALED_ROWS: tl.constexpr, EACH_ROW: tl.constexpr, SCALED_OUTPUTS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP * tiles_n)
    first = group * GROUP
    height = min(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    m = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGER else tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = start + k < K
        left = tl.load(x + m[:, None] * x_stride + (start + k)[None, :], mask=(m < M)[:, None] & in_k[None, :], other=0)
        right = tl.load(w + n[None, :] * K + (start + k)[:, None], mask=(n < N)[None, :] & in_k[:, None], other=0)
        if DECODE:
            # As in fp8.cpu: a code is a cut of float16's bits; of e4m3fn it reads as the number over 256.
            code = right.to(tl.int16)
            code = ((code & 0x80) << 8) | ((code & 0x7F) << 7) if E4M3 else code << 8
            right = code.to(tl.float16, bitcast=True).to(left.dtype)
        elif not INTEGER:
            left, right = left.to(tl.float8e4nv, bitcast=True), right.to(tl.float8e4nv, bitcast=True)
        total = tl.dot(left, right, total, out_dtype=total.dtype)

    total = total.to(tl.float32)
    if SCALED_ROWS:
        total *= tl.load(x_scale + m * EACH_ROW, mask=m < M, other=0.0)[:, None]
    if SCALED_OUTPUTS:
        total *= tl.load(w_scale + n, mask=n < N, other=0.0)[None, :]
    else:
        total *= tl.load(w_scale)
    if DECODE and E4M3:
        total *= 256.0
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def w8a8(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None = None) -> Tensor:
    """x [M, K] bfloat16 or float16, rounded to e4m3fn by `input_scale` ([] or [M, 1]) or else row by row; weight
    [N, K] e4m3fn; bias [N] → [M, N]."""
    return w8a8_scaled(quantize_rows(x, input_scale), weight, bias, x.dtype)


def w8a8_scaled(x: Scaled, weight: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [M, K] and weight [N, K] e4m3fn, x's scale [] or [M, 1]; bias [N] → [M, N] in `dtype`."""
    codes, w = x.q.view(torch.uint8), weight.q.view(torch.uint8)
    return _launch(codes, x.scale, w, weight.scale, bias, dtype, decode=None)


def w8a16(x: Tensor, weight: Scaled, bias: Tensor | None) -> Tensor:
    """x [M, K] bfloat16 or float16; weight [N, K] FP8, finite; bias [N] → [M, N]. Every FP8 number is exact in both."""
    return _launch(in_rows(x), None, weight.q.view(torch.uint8), weight.scale, bias, x.dtype, decode=weight.q.dtype)


def int8(x: Tensor, twin: Scaled, bias: Tensor | None) -> Tensor:
    """x [M, K] of any floating dtype, rounded row by row to INT8; twin [N, K] INT8 by row; bias [N] → [M, N]."""
    return int8_scaled(quantize_rows(x, form="int8"), twin, bias, x.dtype)


def int8_scaled(x: Scaled, twin: Scaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [M, K] and the twin [N, K] INT8, by row both; bias [N] → [M, N] in `dtype`."""
    return _launch(x.q, x.scale, twin.q, twin.scale, bias, dtype, decode=None)


def _launch(
    x: Tensor,
    x_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out: torch.dtype,
    *,
    decode: torch.dtype | None,
) -> Tensor:
    (M, K), N = x.shape, w.shape[0]
    y = torch.empty(M, N, dtype=out, device=x.device)
    block_m = 16 if M <= 16 else 64 if M <= 256 else 128
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, 128)
    if tiles:
        with on(x.device):
            _multiply[(tiles,)](
                x, w_scale if x_scale is None else x_scale, w, w_scale, w_scale if bias is None else bias, y,
                M, N, K, x.stride(0),
                DECODE=decode is not None, E4M3=decode is E4M3FN.dtype, INTEGER=w.dtype == torch.int8,
                SCALED_ROWS=x_scale is not None, EACH_ROW=int(x_scale is not None and x_scale.ndim > 0),
                SCALED_OUTPUTS=w_scale.ndim == 2, BIAS=bias is not None,
                BLOCK_M=block_m, BLOCK_N=128, BLOCK_K=64, GROUP=GROUP, num_warps=8, num_stages=STAGES,
            )  # fmt: skip
    return y
