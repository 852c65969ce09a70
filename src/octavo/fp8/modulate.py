"""The steps between a block's products, ending in what the next product takes: the plain definitions.

Where a layer multiplies 8 bits by 8 bits, its input is normalised, modulated and rounded in one pass over memory, not
in five. Every step computes in float32 whatever dtype it is given, and rounds once: more exact than the same operations
one by one in 16 bits. `kernels.modulate`, `.residual`, `.gelu` and `.heads` do the same in Triton and are proven
against these; `fused` decides which layers are served so.

B batch, L tokens, D width, H heads, E = D/H. Shifts, scales and gates are [B, D], or [B, L, D] with one for each token;
their rows may lie anywhere, as views of a table do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.fp8.int8 import quantize_int8
from octavo.fp8.scale import Form, Scaled, quantize_input

EPS = 1e-6  # of the layer norm


class Taker(NamedTuple):
    """How a layer takes its normalised input."""

    shift: Tensor  # [B, D] or [B, L, D]
    scale: Tensor  # likewise; the input is multiplied by 1 + scale
    form: Form | None  # of its rows; None: x's dtype
    input_scale: Tensor | None = None  # float32, calibrated: [] or [B·L, 1]; INT8 is rounded by row without it


class Stream(NamedTuple):
    """What one qkv layer gave, and the weights of the norms of queries and keys."""

    qkv: Tensor  # [B, L, 3·D]
    heads: int
    of_q: Tensor | None  # [E]; None: no norm
    of_k: Tensor | None
    eps: float


def modulated(x: Tensor, *takers: Taker) -> list[Scaled | Tensor]:
    """x [B, L, D] layer-normalised once; times 1 + scale, plus shift, for each taker.

    Returns:
        For each taker its rows: 8 bits [B·L, D], or [B, L, D] in x's dtype.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    results = list[Scaled | Tensor]()
    for taker in takers:
        y = torch.addcmul(by_token(taker.shift.float()), normed, 1 + by_token(taker.scale.float()))
        results.append(_rows(y, taker.form, taker.input_scale, x.dtype))
    return results


def residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate · branch, x and branch [B, L, D] → [B, L, D], rounded once to x's dtype."""
    return torch.addcmul(x.float(), by_token(gate.float()), branch.float()).to(x.dtype)


def residual_modulated(x: Tensor, gate: Tensor, branch: Tensor, taker: Taker) -> tuple[Tensor, Scaled | Tensor]:
    """`residual`, and `modulated` of that as it was rounded."""
    x = residual(x, gate, branch)
    (rows,) = modulated(x, taker)
    return x, rows


def gelu(x: Tensor, form: Form, input_scale: Tensor | None = None) -> Scaled:
    """GELU (its tanh form; Hendrycks & Gimpel 2016, arXiv 1606.08415) of x [..., K] → rows of 8 bits [M, K]."""
    rows = _rows(F.gelu(x.float(), approximate="tanh"), form, input_scale, x.dtype)
    assert isinstance(rows, Scaled)
    return rows


def heads(*streams: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, divided by their root mean square and weighted, and values, of all streams one after the other.

    Returns:
        Three [B, ΣL, H, E] in the streams' dtype: views of memory that holds [B, H, ΣL, E], where attention finds the
        tokens of a head side by side.
    """
    parts = []
    for qkv, count, of_q, of_k, eps in streams:
        q, k, v = qkv.view(*qkv.shape[:-1], 3, count, -1).unbind(2)
        parts.append((_root_mean_square(q, of_q, eps), _root_mean_square(k, of_k, eps), v))
    q, k, v = (torch.cat(each, dim=1).transpose(1, 2).contiguous().transpose(1, 2) for each in zip(*parts, strict=True))
    return q, k, v


def by_token(vector: Tensor) -> Tensor:
    """[B, D] → [B, 1, D]; [B, L, D] as it is."""
    return vector if vector.ndim == 3 else vector[:, None]


def _root_mean_square(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def _rows(y: Tensor, form: Form | None, input_scale: Tensor | None, dtype: torch.dtype) -> Scaled | Tensor:
    if form is None:
        return y.to(dtype)
    rows = y.reshape(-1, y.shape[-1])
    return quantize_int8(rows) if form == "int8" else quantize_input(rows, input_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One way to take these steps."""

    name: str
    modulated: Callable[..., list[Scaled | Tensor]]
    residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    residual_modulated: Callable[[Tensor, Tensor, Tensor, Taker], tuple[Tensor, Scaled | Tensor]]
    gelu: Callable[[Tensor, Form, Tensor | None], Scaled]
    heads: Callable[..., tuple[Tensor, Tensor, Tensor]]


DEFINITIONS = Kernels(
    name="definitions",
    modulated=modulated,
    residual=residual,
    residual_modulated=residual_modulated,
    gelu=gelu,
    heads=heads,
)


def triton_kernels() -> Kernels:
    """The same in Triton, which has to be installed."""
    from octavo.fp8.kernels import gelu as of_gelu
    from octavo.fp8.kernels import heads as of_heads
    from octavo.fp8.kernels import modulate as of_norms
    from octavo.fp8.kernels import residual as of_gates

    return Kernels(
        name="triton",
        modulated=of_norms.modulated,
        residual=of_gates.residual,
        residual_modulated=of_norms.residual_modulated,
        gelu=of_gelu.gelu,
        heads=of_heads.heads,
    )
