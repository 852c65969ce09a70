"""What the inputs of linear layers are like, over a calibration.

with Observer(linears, needs) as observer:
    observer.group = 0                     # which part of the schedule the next calls belong to
    model(...)
observer.statistics("joint_blocks.0.x_block.mlp.fc1")
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from octavo.quantize.recipe import Statistic

# The histogram counts magnitudes by powers of two in steps of an eighth, far beyond what FP8 can tell apart.
LOWEST, BINS_PER_OCTAVE, BINS = -40, 8, 512


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """Of one linear layer's input x [rows, K].

    Attributes:
        rows: seen.
        square: [K] float32, mean of x².
        amax: [G] float32, largest |x| by step group; 0 where the group never came.
        histogram: [G, BINS] int64, how many |x| of each magnitude, zeros left out.
        covariance: [K, K] float32, mean of x xᵀ, or None where it was not asked for.
    """

    rows: int
    square: Tensor
    amax: Tensor
    histogram: Tensor
    covariance: Tensor | None

    def scaled(self, s: Tensor) -> "InputStatistics":
        """Those of x · s, for a factor [K] on each channel; the histogram keeps the old magnitudes and is left out."""
        covariance = None if self.covariance is None else self.covariance * s * s[:, None]
        return InputStatistics(self.rows, self.square * s**2, self.amax, self.histogram, covariance)


class Observer:
    """Watches linear layers while it is entered.

    Args:
        layers: by name.
        needs: by name, what shall be known of the input; layers without a need are not watched.
        groups: how many parts the schedule is seen as; set `group` before each call.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], needs: Mapping[str, frozenset[Statistic]], groups: int = 1
    ) -> None:
        self.group = 0
        self._layers = {name: layer for name, layer in layers.items() if needs.get(name)}
        self._sums = {
            name: _Sums(layer, groups, covariance="covariance" in needs[name]) for name, layer in self._layers.items()
        }
        self._handles: list[Any] = []

    def statistics(self, name: str) -> InputStatistics | None:
        """What was seen of the layer's input; None for one that is not watched or was never called."""
        sums = self._sums.get(name)
        return None if sums is None or not sums.rows else sums.result()

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(self._sums[name])))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, sums: "_Sums") -> Any:
        return lambda _layer, inputs: sums.add(inputs[0], self.group)


class _Sums:
    def __init__(self, layer: nn.Module, groups: int, *, covariance: bool) -> None:
        features = layer.in_features
        assert isinstance(features, int)
        self.rows = 0
        self.groups = groups
        self.features = features
        self.wants_covariance = covariance
        self.square: Tensor | None = None

    def add(self, x: Tensor, group: int) -> None:
        x = x.detach().reshape(-1, self.features).float()
        if self.square is None:
            self.square = torch.zeros(self.features, device=x.device)
            self.amax = torch.zeros(self.groups, device=x.device)
            self.histogram = torch.zeros(self.groups, BINS, dtype=torch.int64, device=x.device)
            self.covariance = (
                torch.zeros(self.features, self.features, device=x.device) if self.wants_covariance else None
            )
        self.rows += len(x)
        self.square += (x * x).sum(0)
        magnitude = x.abs()
        self.amax[group] = torch.maximum(self.amax[group], magnitude.amax())
        bins = ((magnitude[magnitude > 0].log2() - LOWEST) * BINS_PER_OCTAVE).long().clamp(0, BINS - 1)
        self.histogram[group] += torch.bincount(bins, minlength=BINS)
        if self.covariance is not None:
            self.covariance.addmm_(x.t(), x)

    def result(self) -> InputStatistics:
        assert self.square is not None
        covariance = None if self.covariance is None else self.covariance / self.rows
        return InputStatistics(self.rows, self.square / self.rows, self.amax, self.histogram, covariance)
