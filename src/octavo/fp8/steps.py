"""Inputs that drift: calibrated scales that change over the schedule.

A layer whose spec has `step_sigmas` keeps one input scale for each part of the schedule. Which part the rows of a call
belong to is said from outside, for a layer sees numbers, not noise levels:

    with at_sigmas(model, [0.9, 0.2]):     # of the two rows of the batch
        model(...)

Unsaid, the largest of its scales holds, which clips nothing that any part of the schedule brings.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from octavo.fp8.linear import Fp8Linear

_STEPPED: WeakKeyDictionary[nn.Module, tuple[Fp8Linear, ...]] = WeakKeyDictionary()
_SAID: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], ...]] = WeakKeyDictionary()


def step_group(sigma: float, step_sigmas: Sequence[float]) -> int:
    """Which part of the schedule `sigma` is in, from 0: as many of the falling levels as it does not exceed."""
    return sum(sigma <= level for level in step_sigmas)


@contextmanager
def at_sigmas(model: nn.Module, sigmas: Sequence[float], *, tokens: Tensor | None = None) -> Iterator[None]:
    """Say of what noise levels the B rows of the model's inputs are, while entered; free where no layer asks.

    Args:
        model: `prepare` has to be called anew when its layers are exchanged.
        sigmas: B levels.
        tokens: [M] of inputs [1, M, K] that hold the tokens of rows of unlike lengths: the row of each token.
    """
    layers = _stepped(model)
    parts = dict[tuple[float, ...], tuple[int, ...]]()  # by levels, which most layers have in common
    for layer in layers:
        assert layer.input_scale is not None, "a layer with steps has a scale for each of them"
        levels = layer.spec.step_sigmas
        if levels not in parts:
            parts[levels] = tuple(step_group(sigma, levels) for sigma in sigmas)
        groups = parts[levels]
        layer.groups = groups[0] if len(set(groups)) == 1 else _index(groups, layer.input_scale.device)
        layer.tokens = tokens
    if layers:
        _SAID[model] = tuple(parts.values())
    try:
        yield
    finally:
        _SAID.pop(model, None)
        for layer in layers:
            layer.groups = layer.tokens = None


def groups_of(model: nn.Module) -> tuple[Hashable, tuple[Tensor, ...]]:
    """What `at_sigmas` says now: a value that is equal where it says the same, and the tensors that it says it by."""
    said = _SAID.get(model)
    if said is None:
        return None, ()
    layers = _stepped(model)
    return said, tuple(x for layer in layers for x in (layer.groups, layer.tokens) if isinstance(x, Tensor))


@lru_cache(maxsize=64)
def _index(groups: tuple[int, ...], device: torch.device) -> Tensor:
    """The parts of the schedule of a call's rows where they differ; kept, for bringing it to a GPU stops a step."""
    with torch.inference_mode(False):
        return torch.tensor(groups, device=device)


def forget(model: nn.Module) -> None:
    """Look anew for the model's layers when next they are needed."""
    _STEPPED.pop(model, None)


def _stepped(model: nn.Module) -> tuple[Fp8Linear, ...]:
    found = _STEPPED.get(model)
    if found is None:
        layers = (layer for layer in model.modules() if isinstance(layer, Fp8Linear))
        found = _STEPPED[model] = tuple(layer for layer in layers if layer.spec.step_sigmas)
    return found
