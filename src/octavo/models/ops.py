"""What stands between the products of a block: modulation, gates, GELU, heads and attention, in their plain form.

The blocks of the MMDiT and of its ControlNets ask an `Ops` for each of these steps, together with the linear layer
that takes what it gives. So a set of fused kernels can hand a layer its input in 8 bits, normalised, modulated and
rounded in one pass over memory, by taking the place of the whole object (`use_ops`), and the blocks stay the figure of
the paper. `PLAIN` is the definition; every other set is proven against it.

Shifts, scales and gates are [B, D], a vector for each row. Where the texts of rows of unlike lengths lie one after the
other (`packed`), x is [1, ΣL, D] and so are they: a vector for each token.

B batch, L tokens, D width, H heads, E = D/H.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.models.attention import Attend, attention
from octavo.models.layers import by_token, modulate_normed, norm


class QKV(NamedTuple):
    """Queries, keys and values, each [B, L, H, E]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Target(NamedTuple):
    """A linear layer, and how its input is modulated."""

    linear: nn.Module
    shift: Tensor  # [B, D], or by token [B, L, D]
    scale: Tensor  # likewise


class Heads(Protocol):
    """What of a `SelfAttention` its queries and keys pass through."""

    heads: int
    ln_q: nn.Module
    ln_k: nn.Module


class Ops(Protocol):
    """See the module; `PlainOps` says what each step means."""

    def modulated(self, x: Tensor, *targets: Target) -> list[Tensor]: ...

    def residual(self, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor: ...

    def residual_modulated(self, x: Tensor, gate: Tensor, branch: Tensor, target: Target) -> tuple[Tensor, Tensor]: ...

    def gelu(self, x: Tensor, linear: nn.Module) -> Tensor: ...

    def heads(self, *streams: tuple[Heads, Tensor]) -> QKV: ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class PlainOps:
    """The definitions.

    Attributes:
        attend: how to attend; other ways than the definition are chosen among in `placement.attention`.
    """

    def __init__(self, attend: Attend = attention) -> None:
        self.attend = attend

    def modulated(self, x: Tensor, *targets: Target) -> list[Tensor]:
        """What each target's layer makes of x [B, L, D], layer-normalised once and modulated for each."""
        normed = norm(x)
        return [linear(modulate_normed(normed, shift, scale)) for linear, shift, scale in targets]

    def residual(self, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        """x + gate · branch: [B, L, D], [B, D] (or by token) and [B, L, D]."""
        return torch.addcmul(x, by_token(gate), branch)

    def residual_modulated(self, x: Tensor, gate: Tensor, branch: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """`residual`, and what the target's layer makes of it when normalised and modulated."""
        x = self.residual(x, gate, branch)
        (out,) = self.modulated(x, target)
        return x, out

    def gelu(self, x: Tensor, linear: nn.Module) -> Tensor:
        """What `linear` makes of GELU (tanh) of x [B, L, 4·D]."""
        out: Tensor = linear(F.gelu(x, approximate="tanh"))
        return out

    def heads(self, *streams: tuple[Heads, Tensor]) -> QKV:
        """Queries and keys, normalised, and values of all streams together, from what each one's layer gave.

        Args:
            streams: each the attention and its qkv layer's output [B, L, 3·D].

        Returns:
            [B, ΣL, H, E], the streams one after the other.
        """
        parts = []
        for attn, qkv in streams:
            q, k, v = qkv.view(*qkv.shape[:-1], 3, attn.heads, -1).unbind(2)
            parts.append(QKV(attn.ln_q(q), attn.ln_k(k), v))
        return parts[0] if len(parts) == 1 else QKV(*(torch.cat(each, dim=1) for each in zip(*parts, strict=True)))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, L, H, E] each → [B, L, D]."""
        return self.attend(q, k, v)


PLAIN: Ops = PlainOps()


def use_ops(model: nn.Module, ops: Ops) -> None:
    """Let all blocks of `model` take these steps from now on."""
    for part in each_with_ops(model):
        part.ops = ops  # type: ignore[assignment]  # no module, but what torch's annotations know nothing of


def each_with_ops(model: nn.Module) -> Sequence[nn.Module]:
    """The modules of `model` that take such steps, each with its `ops`."""
    return [module for module in model.modules() if hasattr(module, "ops")]
