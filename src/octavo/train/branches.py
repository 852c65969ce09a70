"""Low-rank branches on a frozen model, to be trained: y + x · downᵀ · upᵀ · alpha / rank.

They hang on the layers from outside, as `models.adapter` has it, so that it is all one whether a layer keeps its
weight in FP8. `up` begins as zeros: at first the model is what it was.

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.errors import RequestError, did_you_mean
from octavo.models import MMDiT
from octavo.models.adapter import LowRank

_ATTENTION = r"joint_blocks\.\d+\.\w+\.attn2?\.(qkv|proj)"
# Which linear layers get a branch, by name of the choice.
LAYERS = {
    "attention": _ATTENTION,
    "blocks": rf"{_ATTENTION}|joint_blocks\.\d+\.\w+\.mlp\.fc[12]",
    "all": r"joint_blocks\..*|context_embedder|final_layer\..*",
}


class Branch(nn.Module):
    """The branch of one layer; `down` [r, K] and `up` [N, r] in float32."""

    def __init__(self, layer: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = cast(int, layer.out_features), cast(int, layer.in_features)
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in the dtype of `x`."""
        return F.linear(F.linear(x, self.down.to(x.dtype)), (self.up * self.scale).to(x.dtype))


class Branches(nn.Module):
    """Branches for the layers of an MMDiT that a choice of `LAYERS` names.

    Raises:
        RequestError: no such choice.
    """

    def __init__(self, mmdit: MMDiT, *, layers: str, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        if layers not in LAYERS:
            raise RequestError(
                f"There are no layers '{layers}': use {', '.join(LAYERS)}.{did_you_mean(layers, LAYERS)}"
            )
        pattern = re.compile(LAYERS[layers])
        linears = {
            name: layer
            for name, layer in mmdit.named_modules()
            if hasattr(layer, "in_features") and pattern.fullmatch(name)
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # A module's children cannot have dots in their names.
            self.of = nn.ModuleDict({_key(name): Branch(layer, rank, alpha) for name, layer in linears.items()})
        self.names = tuple(linears)

    @property
    def on_modulation(self) -> bool:
        """Whether any of them acts where tables of modulation are made."""
        return any("adaLN_modulation" in name for name in self.names)

    @contextmanager
    def attached(self, mmdit: MMDiT) -> Iterator[None]:
        """Let them act on the model while entered; until gradients are there, should activations be computed again."""
        handles = []
        try:
            for name in self.names:
                handles.append(mmdit.get_submodule(name).register_forward_hook(_hook(self.of[_key(name)])))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def changes(self) -> dict[str, LowRank]:
        """What they amount to now, by layer; copies."""
        found = {}
        for name in self.names:
            branch = cast(Branch, self.of[_key(name)])
            found[name] = LowRank(branch.down.detach().clone(), branch.up.detach() * branch.scale)
        return found


def _key(name: str) -> str:
    return name.replace(".", "/")


def _hook(branch: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change: Tensor = branch(inputs[0])
        return output + change

    return add
