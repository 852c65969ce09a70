"""Layer norm, modulation and rounding of tokens in one pass over memory; a gated residual before it if wanted.

Plain definitions: `octavo.fp8.modulate.modulated` and `.residual_modulated`. One program takes one token: it holds the
whole row in registers, so that x is read once however many layers take it.

B batch, L tokens, D width.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.fp8.kernels.launch import LONGEST_ROW, given_scale, on, vector, warps
from octavo.fp8.kernels.quantize import ROUNDINGS, native, store_row
from octavo.fp8.modulate import EPS, Taker
from octavo.fp8.scale import Scaled


@triton.jit
def _vector(start, at, offsets, inside):  # type: ignore[no-untyped-def]
    """A row of a shift or a scale, in float32; 0 outside, so that what comes of it there is never the largest value."""
    return tl.load(start + at + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_rows(  # type: ignore[no-untyped-def]
    x, x_batch, x_token, gate, gate_batch, gate_token, branch, branch_batch, branch_token, new,
    shift_a, shift_a_batch, shift_a_token, scale_a, scale_a_batch, scale_a_token, given_a, out_a, scales_a,
    shift_b, shift_b_batch, shift_b_token, scale_b, scale_b_batch, scale_b_token, given_b, out_b, scales_b,
    tokens, columns, eps,
    RESIDUAL: tl.constexpr, TWO: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr,
    FORM_A: tl.constexpr, GIVEN_A: tl.constexpr, EACH_A: tl.constexpr, LARGEST_A: tl.constexpr,
    FORM_B: tl.constexpr, GIVEN_B: tl.constexpr, EACH_B: tl.constexpr, LARGEST_B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    value = tl.load(x + batch * x_batch + token * x_token + offsets, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        added = tl.load(branch + batch * branch_batch + token * branch_token + offsets, mask=inside, other=0.0)
        factor = tl.load(gate + batch * gate_batch + token * gate_token + offsets, mask=inside, other=0.0)
        kept = (value + factor.to(tl.float32) * added.to(tl.float32)).to(new.dtype.element_ty)
        tl.store(new + row * columns + offsets, kept, mask=inside)
        value = kept.to(tl.float32)  # as the next step would read it
    # Exact division: an error of the mean counts in units of what may be a small deviation.
    mean = tl.div_rn(tl.sum(value, axis=0), columns * 1.0)
    centred = tl.where(inside, value - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / columns + eps)

    shift = _vector(shift_a, batch * shift_a_batch + token * shift_a_token, offsets, inside)
    scale = _vector(scale_a, batch * scale_a_batch + token * scale_a_token, offsets, inside)
    store_row(
        normed * (1.0 + scale) + shift, inside, offsets, row, columns, out_a, scales_a, given_a,
        FORM_A, GIVEN_A, EACH_A, NATIVE, LARGEST_A,
    )  # fmt: skip
    if TWO:
        shift = _vector(shift_b, batch * shift_b_batch + token * shift_b_token, offsets, inside)
        scale = _vector(scale_b, batch * scale_b_batch + token * scale_b_token, offsets, inside)
        store_row(
            normed * (1.0 + scale) + shift, inside, offsets, row, columns, out_b, scales_b, given_b,
            FORM_B, GIVEN_B, EACH_B, NATIVE, LARGEST_B,
        )  # fmt: skip


def modulated(x: Tensor, *takers: Taker) -> list[Scaled | Tensor]:
    """x [B, L, D] → for each taker its rows, two takers a launch; D up to `LONGEST_ROW`. See the definition."""
    return [rows for i in range(0, len(takers), 2) for rows in _launch(x, None, takers[i : i + 2])[1]]


def residual_modulated(x: Tensor, gate: Tensor, branch: Tensor, taker: Taker) -> tuple[Tensor, Scaled | Tensor]:
    """x and branch [B, L, D], gate [B, D] or [B, L, D] → the new x and the taker's rows. See the definition."""
    new, (rows,) = _launch(x, (gate, branch), [taker])
    return new, rows


def _launch(
    x: Tensor, gated: tuple[Tensor, Tensor] | None, takers: Sequence[Taker]
) -> tuple[Tensor, list[Scaled | Tensor]]:
    B, L, D = x.shape
    assert D <= LONGEST_ROW, f"rows of {D} do not fit"
    gate, branch = (x, x) if gated is None else gated
    new = x if gated is None else torch.empty(B, L, D, dtype=x.dtype, device=x.device)
    sides = [_side(x, taker) for taker in takers]
    block = triton.next_power_of_2(D)
    if B * L:
        with on(x.device):
            _norm_rows[(B * L,)](
                *vector(x), *vector(gate), *vector(branch), new,
                *sides[0].arguments, *sides[-1].arguments, L, D, EPS,
                RESIDUAL=gated is not None, TWO=len(takers) == 2, NATIVE=native(x.device), BLOCK=block,
                **{f"{name}_A": value for name, value in sides[0].constants.items()},
                **{f"{name}_B": value for name, value in sides[-1].constants.items()},
                num_warps=warps(block),
            )  # fmt: skip
    return new, [side.rows for side in sides]


class _Side(NamedTuple):
    """What of a taker the kernel is told, and the room for its rows."""

    rows: Scaled | Tensor
    arguments: tuple[Tensor | int, ...]
    constants: Mapping[str, object]


def _side(x: Tensor, taker: Taker) -> _Side:
    B, L, D = x.shape
    vectors = (*vector(taker.shift), *vector(taker.scale))
    if taker.form is None:
        out = torch.empty(B, L, D, dtype=x.dtype, device=x.device)
        return _Side(out, (*vectors, x, out, x), {"FORM": 0, "GIVEN": False, "EACH": 0, "LARGEST": 0.0})
    rounding, given = ROUNDINGS[taker.form], given_scale(taker.form, taker.input_scale)
    q = torch.empty(B * L, D, dtype=rounding.dtype, device=x.device)
    scales = torch.empty(B * L, 1, dtype=torch.float32, device=x.device) if given is None else given
    codes = q.view(torch.uint8) if taker.form == "e4m3fn" else q
    constants = {
        "FORM": 1 if taker.form == "e4m3fn" else 2,
        "GIVEN": given is not None,
        "EACH": int(given is not None and given.ndim > 0),
        "LARGEST": rounding.max,
    }
    return _Side(Scaled(q, scales), (*vectors, scales, codes, scales), constants)
