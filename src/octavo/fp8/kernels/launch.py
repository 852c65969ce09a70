"""How kernels that take rows are launched: limits and sizes, as data."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from octavo.fp8.scale import Form

LONGEST_ROW = 16384  # columns that one program holds in registers
ELEMENTS_A_WARP = 512  # 16 a lane: two loads of 16 bytes in 16 bits
MOST_WARPS = 16


def warps(block: int) -> int:
    """Warps for a program that holds `block` numbers, a power of two."""
    return min(MOST_WARPS, max(1, block // ELEMENTS_A_WARP))


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def in_rows(x: Tensor) -> Tensor:
    """`x` with the numbers of a row side by side; the rows may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def vector(x: Tensor) -> tuple[Tensor, int, int]:
    """[B, D] or [B, L, D], and its strides from row to row and from token to token, as kernels take them."""
    x = in_rows(x)
    return (x, x.stride(0), x.stride(1)) if x.ndim == 3 else (x, x.stride(0), 0)


def given_scale(form: Form, input_scale: Tensor | None) -> Tensor | None:
    """A calibrated scale is for FP8; INT8 has a scale for each row, which is finer."""
    return input_scale if form == "e4m3fn" else None
