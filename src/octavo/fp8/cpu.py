"""Multiply on a CPU: codes become numbers block by block in one reused buffer, and each block goes through a fast GEMM.

FP8 codes are a cut of float16's bit patterns, so a few integer operations on whole vectors decode them, where torch's
own conversion goes number by number: 6.2 against 0.36 billion a second on one core.
The plain definition is `scale.dequantize` and F.linear. In float32 the decoded weight equals the definition's bit for
bit, and the results differ by the order of summation only.
"""

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.fp8.formats import E4M3FN, FORMATS, Fp8Format
from octavo.fp8.scale import Scaled

BLOCK_BYTES = 8 << 20  # of decoded numbers; larger ones leave the cache, smaller ones cost calls

Linear = Callable[[Tensor, Tensor], Tensor]


def onednn_matmul(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    """x · weightᵀ + bias in float32 by oneDNN's GEMM, which uses AVX-512 wherever it is; MKL's does not.

    Args:
        x: [M, K] float32, bfloat16 or float16.
        weight: [N, K] FP8, finite, with scales of any kind.
        bias: [N] or None.
        input_scale: not needed, since x is not rounded.

    Returns:
        [M, N], rounded once to x's dtype.
    """
    return _blockwise(x, weight, bias, _onednn_linear)


def blas_matmul(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    """As `onednn_matmul`, by the GEMM that F.linear uses."""
    return _blockwise(x, weight, bias, F.linear)


def bfloat16_matmul(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:  # noqa: ARG001
    """x · weightᵀ + bias with x and each product rounded to bfloat16, the sums within a product in float32.

    FP8 numbers are bfloat16 numbers, so the weight loses nothing: its scale is applied to the product, in float32.
    Shapes and dtypes as `onednn_matmul`.
    """
    (M, K), N = x.shape, weight.q.shape[0]
    out = torch.empty(M, N, dtype=torch.float32, device=x.device)
    x = x.bfloat16()
    for start, stop in _blocks(N, K, bytes_each=2):
        block = decode(weight.q[start:stop], _buffer("bfloat16", stop - start, K, torch.bfloat16))
        out[:, start:stop] = F.linear(x, block)
    out *= (weight.scale * _unit(FORMATS[weight.q.dtype])).reshape(1, -1)
    return out if bias is None else out.add_(bias)


def decode(q: Tensor, out: Tensor) -> Tensor:
    """Fill `out` with the numbers of the finite codes `q`, of its shape, divided by `_unit` of their format; exact.

    As float16, an e4m3fn code in the same place but for one more bit of exponent is its number over 256, since the
    exponents' biases are 7 and 15; subnormal numbers included. An e5m2 code is the upper half of a float16.
    """
    codes = _buffer("codes", q.shape[0], q.shape[1], torch.int16)
    codes.copy_(q.view(torch.int8))
    if FORMATS[q.dtype] is E4M3FN:
        codes.bitwise_left_shift_(7).bitwise_and_(~(1 << 14))  # the sign fills two bits: clear the lower one
    else:
        codes.bitwise_left_shift_(8)
    return out.copy_(codes.view(torch.float16))


def _unit(fmt: Fp8Format) -> float:
    return 256.0 if fmt is E4M3FN else 1.0


def _blockwise(x: Tensor, weight: Scaled, bias: Tensor | None, linear: Linear) -> Tensor:
    (M, K), N = x.shape, weight.q.shape[0]
    out = torch.empty(M, N, dtype=torch.float32, device=x.device)
    # The unit is a power of two: multiplied by it, a scale is as exact as it was.
    scale = weight.scale * _unit(FORMATS[weight.q.dtype])
    # By block, scales for each row and some columns; else one for each row and all columns.
    columns = K if weight.block is None else weight.block[1]
    scale = scale.expand(N, 1) if weight.block is None else scale.repeat_interleave(weight.block[0], 0)
    wide = x.float()
    for start, stop in _blocks(N, K, bytes_each=4):
        block = decode(weight.q[start:stop], _buffer("float32", stop - start, K, torch.float32))
        for i, first in enumerate(range(0, K, columns)):
            block[:, first : first + columns] *= scale[start:stop, i : i + 1]
        out[:, start:stop] = linear(wide, block)
    if bias is not None:
        out += bias
    return out.to(x.dtype)


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def _blocks(rows: int, columns: int, *, bytes_each: int) -> list[tuple[int, int]]:
    """Equal row ranges whose numbers take about BLOCK_BYTES."""
    count = max(1, round(rows * columns * bytes_each / BLOCK_BYTES))
    step = -(-rows // count)
    step = -(-step // 16) * 16  # whole vectors
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


class _Memory(threading.local):
    """What a thread reuses from call to call; threads must not share it, since they may multiply at the same time."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_memory = _Memory()


def _buffer(name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    size = rows * columns
    buffer = _memory.buffers.get(name)
    if buffer is None or buffer.numel() < size:
        # Made in inference mode, a tensor could not be written to outside of it.
        with torch.inference_mode(False):
            buffer = _memory.buffers[name] = torch.empty(size, dtype=dtype)
    return buffer[:size].view(rows, columns)
