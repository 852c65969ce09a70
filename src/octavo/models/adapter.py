"""Changes to linear layers that stay beside them: what LoRA, LoHa, LoKr and DoRA add to a model.

An adapter never touches a weight. While it is attached, a layer's output is its own plus what the adapter says of the
same input, so a layer in FP8 is not rounded a second time, and taking the adapter off leaves no trace. Nothing here
knows how files name layers; that is for `checkpoint.lora`.

Sources: Hu et al. 2021 (arXiv 2106.09685) for LoRA; Hyeon-Woo et al. 2022 (arXiv 2108.06098) for the Hadamard product
of LoHa; Yeh et al. 2024 (arXiv 2309.14859) for LoKr; Liu et al. 2024 (arXiv 2402.09353) for DoRA.

M rows, K inputs and N outputs of a layer, r the rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Delta(Protocol):
    """A change D [N, K] of a weight, in whatever form it is kept."""

    def __call__(self, x: Tensor) -> Tensor:
        """x · Dᵀ: [M, K] → [M, N]."""

    def dense(self) -> Tensor:
        """D, [N, K] float32."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "Delta":
        """The same elsewhere."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """D = up · down."""

    down: Tensor  # [r, K]
    up: Tensor  # [N, r], alpha / rank included

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)

    def dense(self) -> Tensor:
        return self.up.float() @ self.down.float()

    def to(self, device: torch.device, dtype: torch.dtype) -> "LowRank":
        return LowRank(self.down.to(device, dtype), self.up.to(device, dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """D = left ⊗ right, computed without ever making it."""

    left: Tensor  # [n, k]
    right: Tensor  # [N / n, K / k], scale included

    def __call__(self, x: Tensor) -> Tensor:
        x = x.view(len(x), self.left.shape[1], self.right.shape[1])
        inner = F.linear(x, self.right)  # [M, k, N / n]
        return (self.left @ inner).reshape(len(x), -1)

    def dense(self) -> Tensor:
        return torch.kron(self.left.float(), self.right.float())

    def to(self, device: torch.device, dtype: torch.dtype) -> "Kronecker":
        return Kronecker(self.left.to(device, dtype), self.right.to(device, dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """D as it is."""

    weight: Tensor  # [N, K]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def dense(self) -> Tensor:
        return self.weight.float()

    def to(self, device: torch.device, dtype: torch.dtype) -> "Dense":
        return Dense(self.weight.to(device, dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A change of some rows only, where a layer is made of several matrices of the file, or of halves that swap."""

    delta: Delta
    rows: tuple[tuple[int, int, int], ...]  # from row, to row, how many
    total: int  # N

    def __call__(self, x: Tensor) -> Tensor:
        part = self.delta(x)
        whole = part.new_zeros(len(x), self.total)
        for start, to, count in self.rows:
            whole[:, to : to + count] = part[:, start : start + count]
        return whole

    def dense(self) -> Tensor:
        part = self.delta.dense()
        whole = part.new_zeros(self.total, part.shape[1])
        for start, to, count in self.rows:
            whole[to : to + count] = part[start : start + count]
        return whole

    def to(self, device: torch.device, dtype: torch.dtype) -> "Rows":
        return Rows(self.delta.to(device, dtype), self.rows, self.total)


@dataclass(frozen=True, slots=True, eq=False)
class LayerChange:
    """All that an adapter does to one layer."""

    deltas: tuple[Delta, ...]
    magnitude: Tensor | None = None  # [N] float32, of DoRA: the length that each row of the changed weight is given

    def dense(self) -> Tensor:
        """Σ D, [N, K] float32; DoRA's lengths left out."""
        return torch.stack([delta.dense() for delta in self.deltas]).sum(0)

    def merged(self, weight: Tensor, strength: float) -> Tensor:
        """What becomes of `weight` [N, K] float32, should the change be made for good."""
        if self.magnitude is None:
            return weight + strength * self.dense()
        changed = weight + self.dense()
        return weight + strength * (self.factors(changed)[:, None] * changed - weight)

    def factors(self, changed: Tensor) -> Tensor:
        """[N], what DoRA multiplies the rows of the changed weight with."""
        assert self.magnitude is not None
        lengths: Tensor = changed.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return self.magnitude.to(changed) / lengths


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Changes by layer of one model. Compared by identity: the same object is the same change."""

    name: str
    layers: Mapping[str, LayerChange]  # by our name of the linear layer
    _ready: dict[tuple[str, torch.device, torch.dtype], "_Ready"] = field(
        default_factory=dict, repr=False
    )  # changes where they are used

    def change(self, layer: str, module: nn.Module, dtype: torch.dtype) -> "_Ready":
        """The change of `layer`, on the module's device and in `dtype`; made once."""
        device = next(tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta).device
        key = (layer, device, dtype)
        ready = self._ready.get(key)  # another thread may release it at any time
        if ready is None:
            change = self.layers[layer]
            deltas = tuple(delta.to(device, dtype) for delta in joined(change.deltas))
            scale = None
            if change.magnitude is not None:
                weight = weight_of(module, dtype)
                scale = change.factors(weight + change.dense().to(device)).to(dtype)
            ready = self._ready[key] = _Ready(deltas, scale)
        return ready

    @property
    def ready(self) -> "tuple[_Ready, ...]":
        """What was put on devices; empty once it was released."""
        return tuple(self._ready.values())

    def release(self) -> None:
        """Forget what was put on devices."""
        self._ready.clear()


CHANNELS_AT_ONCE = 512  # of a layer that is asked for what it multiplies by

Applied = tuple[tuple[Adapter, float], ...]
"""Adapters and their strengths, in order; what rows of a batch must have in common."""


def joined(deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    """The same change in fewer products: low-rank parts, of all rows or of some, become one of their ranks together."""
    placed = [_placed(delta) for delta in deltas]
    low_rank = [part for part in placed if part is not None]
    if len(low_rank) < 2 and not any(isinstance(delta, Rows) for delta in deltas):
        return tuple(deltas)
    rest = [delta for delta, part in zip(deltas, placed, strict=True) if part is None]
    if not low_rank:
        return tuple(rest)
    down = torch.cat([part.down for part in low_rank])
    up = torch.cat([part.up for part in low_rank], dim=1)
    return (LowRank(down, up), *rest)


def _placed(delta: Delta) -> LowRank | None:
    """A low-rank change as one of all rows; None where it is of another form."""
    if isinstance(delta, LowRank):
        return delta
    if not (isinstance(delta, Rows) and isinstance(delta.delta, LowRank)):
        return None
    up = delta.delta.up.new_zeros(delta.total, delta.delta.up.shape[1])
    for start, to, count in delta.rows:
        up[to : to + count] = delta.delta.up[start : start + count]
    return LowRank(delta.delta.down, up)


@contextmanager
def adapted(model: nn.Module, adapters: Sequence[tuple[Adapter, float]]) -> Iterator[None]:
    """Let the adapters act on `model` while entered.

    Args:
        model: whose layers they name, plain or in FP8.
        adapters: with strengths; 0 does nothing. Several add up.
    """
    by_layer: dict[str, list[tuple[Adapter, float]]] = {}
    for adapter, strength in adapters:
        if strength:
            for name in adapter.layers:
                by_layer.setdefault(name, []).append((adapter, strength))
    handles, before = [], acting(model)
    try:
        for name, several in by_layer.items():
            module = model.get_submodule(name)
            handles.append(module.register_forward_hook(_hook(name, several)))
        if adapters:
            _ACTING[model] = (*before, *adapters)
        yield
    finally:
        for handle in handles:
            handle.remove()
        if adapters:
            _ACTING[model] = before


def acting(model: nn.Module) -> Applied:
    """The adapters that `adapted` lets act on `model` now, with their strengths."""
    return _ACTING.get(model, ())


_ACTING: WeakKeyDictionary[nn.Module, Applied] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Ready:
    deltas: tuple[Delta, ...]
    scale: Tensor | None  # [N] of DoRA


def _hook(
    name: str, several: Sequence[tuple[Adapter, float]]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        result = output
        for adapter, strength in several:
            ready = adapter.change(name, module, rows.dtype)
            change = ready.deltas[0](rows)
            for delta in ready.deltas[1:]:
                change = change + delta(rows)
            change = change.view(output.shape)
            if ready.scale is not None:
                bias = getattr(module, "bias", None)
                own = output if bias is None else output - bias
                change = ready.scale * (own + change) - own
            result = torch.add(result, change, alpha=strength)
        return result

    # All that it does is arithmetic on the device, which a recording of the layer's work can hold.
    add.capturable = True  # type: ignore[attr-defined]
    return add


def weight_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K] of a linear layer in float32; FP8 layers say theirs themselves.

    A layer that gave its FP8 weight up for another form, such as INT8, is asked for each input channel alone: that
    gives what it multiplies by now, which is what a change comes on top of. Of INT8 by row that is within half of a
    127th of a row's largest weight of what the file has; a row's length, which sums many of these, is nearer still.

    Args:
        dtype: of the inputs that such a layer takes.
    """
    if isinstance(module, nn.Linear):
        return module.weight.detach().float()
    if getattr(module, "given_up", False):
        return _asked(module, dtype)
    weight = module.dequantized()  # type: ignore[operator]  # of Fp8Linear, which is on the same floor
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def _asked(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """What a layer multiplies by, from its answers; its hooks are not called."""
    channels, bias = cast(int, module.in_features), cast("Tensor | None", module.bias)
    columns = []
    for start in range(0, channels, CHANNELS_AT_ONCE):
        stop = min(start + CHANNELS_AT_ONCE, channels)
        ones = torch.zeros(stop - start, channels, dtype=dtype, device=cast(Tensor, module.scale).device)
        ones[:, start:stop].fill_diagonal_(1)
        answers: Tensor = module.forward(ones)
        columns.append(answers.float() if bias is None else answers.float() - bias.float())
    return torch.cat(columns).T.contiguous()
