"""Fused steps in the place of a block's plain ones, wherever that pays: decided once for each layer, and told.

ops = fuse(mmdit, plain, QKV, device=device, dtype=dtype)    # after `prepare`
use_ops(mmdit, ops)                                          # of `models.ops`, which this room does not know
print(fused_paths(mmdit))                                    # 226 of 377 steps fused into 8 bits, 151 in 16

A layer is given its input in 8 bits where its backend takes it so (`Backend.run_scaled`), and, on a GPU, where the
fused step was measured to be faster than the plain one. Else the step is fused in 16 bits, or plain. A layer that
something else looks at (a LoRA's hook, `finite.watch`, a low-rank branch, gradients) is called as ever with its input
in 16 bits for as long as that lasts. What the steps mean is in `modulate`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from octavo.fp8.linear import Fp8Linear
from octavo.fp8.modulate import EPS, Kernels, Stream, Taker, triton_kernels
from octavo.fp8.needs import TYPICAL_ROWS, Need
from octavo.fp8.scale import Form, Scaled
from octavo.fp8.timing import Timings
from octavo.fp8.verdicts import NEEDS, STEPS, Judge, PlainSteps, Step, Verdict, unfit

Q = TypeVar("Q")


class HasHeads(Protocol):
    """What of a `SelfAttention` its queries and keys pass through."""

    heads: int
    ln_q: nn.Module
    ln_k: nn.Module


@dataclass(frozen=True, slots=True)
class FusedPaths:
    """How the steps of a model are taken; a step is one layer's input, one residual or one stream's heads."""

    steps: Mapping[tuple[str, str], int]  # (step, bits) → how many
    reasons: Mapping[str, int]  # why steps are not as fused as they could be → how many

    def count(self, bits: str) -> int:
        """Steps taken in "8 bits", fused in "16 bits", or "plain"."""
        return sum(count for (_, how), count in self.steps.items() if how == bits)

    def __str__(self) -> str:
        total, plain = sum(self.steps.values()), self.count("plain")
        told = f"{self.count('8 bits')} of {total} steps fused into 8 bits, {self.count('16 bits')} in 16"
        return told + (f", {plain} plain" if plain else "")

    @property
    def details(self) -> list[str]:
        """A line for each kind of step, and for each reason."""
        taken = [f"{step}, {count}: {bits}" for (step, bits), count in self.steps.items()]
        return taken + [f"not for {count}: {reason}" for reason, count in self.reasons.items()]


def fuse(
    model: nn.Module,
    plain: PlainSteps,
    joined: Callable[[Tensor, Tensor, Tensor], Q],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rows: Callable[[str], int] = lambda _name: TYPICAL_ROWS,
    measure: bool | None = None,
    kernels: Kernels | None = None,
    needs: tuple[Need, ...] = NEEDS,
) -> "FusedOps[Q]":
    """Decide how each step of `model` is taken; call it once, after `prepare`.

    Args:
        model: with blocks whose layers are named as in `STEPS`; not changed.
        plain: the steps as they are defined, for whatever is not fused.
        joined: makes what `plain.heads` gives from q, k and v.
        device: where it runs; its weights may lie in host memory still.
        dtype: of its activations.
        rows: of a layer's input, by the layer's name, where steps are timed.
        measure: time each step against the plain one, and keep the times on disk (see `timing`). None: on a GPU.
        kernels: those to use; None: Triton's.
        needs: of any fused step; a test that runs Triton's interpreter has none.

    Returns:
        What takes the steps, for `models.ops.use_ops`; `fused_paths(model)` tells of it.
    """
    why_none = unfit(device, dtype, needs)
    timings = Timings() if (device.type == "cuda" if measure is None else measure) else None
    judge = Judge(plain, None if why_none else kernels or triton_kernels(), device, dtype, timings, why_none)
    verdicts = dict[nn.Module, Verdict]()
    attentions, residuals, widths = 0, 0, list[int]()
    for name, layer in model.named_modules():
        step = next((step for end, step in STEPS.items() if f".{name}".endswith(f".{end}")), None)
        if step is not None and isinstance(layer, nn.Linear | Fp8Linear):
            verdicts[layer] = judge.layer(step, layer, rows(name))
            widths += [] if step == "gelu" else [layer.in_features]
            # A block's first residual is joined with the norm after it; one after the MLP, and one for attn2, are not.
            residuals += name.endswith(("attn2.qkv", "mlp.fc2"))
            attentions += name.endswith(".qkv")
    width = max(widths, default=16)
    alone: dict[Step, tuple[str | None, int]] = {
        "residual": (judge.alone("residual", width), residuals),
        "heads": (judge.alone("heads", width), attentions),
    }
    norms = judge.alone("modulated", width)
    if timings is not None:
        timings.save()
    ops = FusedOps(plain, joined, judge.kernels, device, verdicts, alone, norms)
    _FUSED[model] = ops
    return ops


_FUSED: "WeakKeyDictionary[nn.Module, FusedOps[Any]]" = WeakKeyDictionary()


def fused_paths(model: nn.Module) -> FusedPaths | None:
    """How the steps of `model` are taken now, for `octavo info` and logs; None where nothing was put on."""
    ops = _FUSED.get(model)
    return None if ops is None else ops.paths()


class FusedOps(Generic[Q]):
    """Steps as `models.ops.Ops` has them, fused where that was decided; made by `fuse`."""

    def __init__(
        self,
        plain: PlainSteps,
        joined: Callable[[Tensor, Tensor, Tensor], Q],
        kernels: Kernels | None,
        device: torch.device,
        verdicts: Mapping[nn.Module, Verdict],
        alone: Mapping[Step, tuple[str | None, int]],
        norms: str | None,
    ) -> None:
        self.plain, self.kernels, self._joined, self._device = plain, kernels, joined, device
        self._verdicts, self._alone, self._norms = verdicts, alone, norms

    def modulated(self, x: Tensor, *targets: tuple[nn.Module, Tensor, Tensor]) -> list[Tensor]:
        """What each target's layer makes of x, normalised once and modulated for each."""
        kernels = self._kernels_for(x)
        if kernels is None or any(self._bits(linear)[0] == "plain" for linear, _, _ in targets):
            return self.plain.modulated(x, *targets)
        rows = kernels.modulated(x, *(self._taker(x, target) for target in targets))
        return [_through(linear, each, x) for (linear, _, _), each in zip(targets, rows, strict=True)]

    def residual(self, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        """x + gate · branch."""
        kernels = self._kernels_for(x)
        if kernels is None or self._alone["residual"][0] is not None:
            return self.plain.residual(x, gate, branch)
        return kernels.residual(x, gate, branch)

    def residual_modulated(
        self, x: Tensor, gate: Tensor, branch: Tensor, target: tuple[nn.Module, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`residual`, and `modulated` of what comes of it."""
        kernels = self._kernels_for(x)
        if kernels is None or self._bits(target[0])[0] == "plain":
            x = self.residual(x, gate, branch)
            (out,) = self.plain.modulated(x, target)
            return x, out
        new, rows = kernels.residual_modulated(x, gate, branch, self._taker(x, target))
        return new, _through(target[0], rows, new)

    def gelu(self, x: Tensor, linear: nn.Module) -> Tensor:
        """What `linear` makes of GELU of x."""
        kernels, (bits, form) = self._kernels_for(x), self._bits(linear)
        if kernels is None or bits != "8 bits" or form is None or not isinstance(linear, Fp8Linear):
            return self.plain.gelu(x, linear)
        return linear.of_rows(kernels.gelu(x, form, linear.input_scale_of(x)), x)

    def heads(self, *streams: tuple[HasHeads, Tensor]) -> Q:
        """Queries, keys and values of all streams."""
        kernels = self._kernels_for(streams[0][1])
        ready = [_stream(attn, qkv) for attn, qkv in streams]
        if kernels is None or self._alone["heads"][0] is not None or None in ready:
            result: Q = self.plain.heads(*streams)
            return result
        return self._joined(*kernels.heads(*ready))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As the plain one."""
        return self.plain.attention(q, k, v)

    def paths(self) -> FusedPaths:
        """How the steps are taken now."""
        steps, reasons = Counter[tuple[str, str]](), Counter[str]()
        for layer, verdict in self._verdicts.items():
            steps[verdict.step, self._bits(layer)[0]] += 1
            if (reason := verdict.reason or _obstacle(layer, verdict)) is not None:
                reasons[reason] += 1
        for step, (reason, count) in self._alone.items():
            if count:
                steps[step, "16 bits" if reason is None else "plain"] += count
                reasons.update({reason: count} if reason is not None else {})
        return FusedPaths(dict(steps), dict(reasons.most_common()))

    def _kernels_for(self, x: Tensor) -> Kernels | None:
        """Those to use for `x`: none on another device, none where gradients may be wanted."""
        return None if x.device.type != self._device.type or torch.is_grad_enabled() else self.kernels

    def _bits(self, layer: nn.Module) -> tuple[str, Form | None]:
        """How the layer's input is made in this call."""
        verdict = self._verdicts.get(layer)
        if verdict is None:
            return "plain", None
        if verdict.bits == "8 bits" and _obstacle(layer, verdict) is not None:
            return ("plain" if verdict.step == "gelu" or self._norms is not None else "16 bits"), None
        return verdict.bits, verdict.form

    def _taker(self, x: Tensor, target: tuple[nn.Module, Tensor, Tensor]) -> Taker:
        layer, shift, scale = target
        _, form = self._bits(layer)
        input_scale = layer.input_scale_of(x) if form is not None and isinstance(layer, Fp8Linear) else None
        return Taker(shift, scale, form, input_scale)


def _through(layer: nn.Module, rows: Scaled | Tensor, like: Tensor) -> Tensor:
    if isinstance(rows, Scaled):
        assert isinstance(layer, Fp8Linear)
        return layer.of_rows(rows, like)
    out: Tensor = layer(rows)
    return out


def _obstacle(layer: nn.Module, verdict: Verdict) -> str | None:
    """What since the decision keeps a layer from taking 8 bits."""
    if not isinstance(layer, Fp8Linear) or verdict.form is None:
        return None
    if layer.choice is not verdict.choice:
        return "it multiplies in another way by now"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "a LoRA or an observer looks at its input"
    return None if layer.lora_down is None else "its low-rank branch takes 16 bits"


def _stream(attn: HasHeads, qkv: Tensor) -> Stream | None:
    """As kernels take it; None where the norms are of a kind that they do not know, or something looks at them."""
    weights, eps = list[Tensor | None](), EPS
    for norm in (attn.ln_q, attn.ln_k):
        weight, own = getattr(norm, "weight", None), getattr(norm, "eps", None)
        if norm._forward_hooks or norm._forward_pre_hooks or hasattr(norm, "bias"):
            return None
        if not isinstance(norm, nn.Identity):
            if not (isinstance(weight, Tensor) and isinstance(own, float)):
                return None
            eps = own
        weights.append(weight)
    return Stream(qkv, attn.heads, weights[0], weights[1], eps)
