"""x + gate · branch in one pass. Plain definition: `octavo.fp8.modulate.residual`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.fp8.kernels.launch import on, vector

BLOCK = 1024  # columns of a program
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _residual(  # type: ignore[no-untyped-def]
    x, x_batch, x_token, gate, gate_batch, gate_token, branch, branch_batch, branch_token, new, tokens, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    value = tl.load(x + batch * x_batch + token * x_token + offsets, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(branch + batch * branch_batch + token * branch_token + offsets, mask=inside, other=0.0)
    factor = tl.load(gate + batch * gate_batch + token * gate_token + offsets, mask=inside, other=0.0)
    kept = value + factor.to(tl.float32) * added.to(tl.float32)
    tl.store(new + row * columns + offsets, kept.to(new.dtype.element_ty), mask=inside)


def residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x and branch [B, L, D], gate [B, D] or [B, L, D] → [B, L, D], contiguous. See the definition."""
    B, L, D = x.shape
    new = torch.empty(B, L, D, dtype=x.dtype, device=x.device)
    if B * L:
        with on(x.device):
            _residual[(B * L, triton.cdiv(D, BLOCK))](
                *vector(x), *vector(gate), *vector(branch), new, L, D, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return new
