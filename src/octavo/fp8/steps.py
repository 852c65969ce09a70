"""Inputs that drift: calibrated scales that change over the schedule.

A layer whose spec has `step_sigmas` keeps one input scale for each part of the schedule. Which part the rows of a call
belong to is said from outside, for a layer sees numbers, not noise levels:

    with at_sigmas(model, [0.9, 0.2]):     # of the two rows of the batch
        model(...)

Unsaid, the largest of its scales holds, which clips nothing that any part of the schedule brings.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from octavo.fp8.linear import Fp8Linear

_STEPPED: WeakKeyDictionary[nn.Module, tuple[Fp8Linear, ...]] = WeakKeyDictionary()


def step_group(sigma: float, step_sigmas: Sequence[float]) -> int:
    """Which part of the schedule `sigma` is in, from 0: as many of the falling levels as it does not exceed."""
    return sum(sigma <= level for level in step_sigmas)


@contextmanager
def at_sigmas(model: nn.Module, sigmas: Sequence[float]) -> Iterator[None]:
    """Say of what noise levels the B rows of the model's inputs are, while entered; free where no layer asks.

    Args:
        model: `prepare` has to be called anew when its layers are exchanged.
        sigmas: B levels.
    """
    layers = _stepped(model)
    for layer in layers:
        groups = [step_group(sigma, layer.spec.step_sigmas) for sigma in sigmas]
        assert layer.input_scale is not None, "a layer with steps has a scale for each of them"
        layer.groups = groups[0] if len(set(groups)) == 1 else torch.tensor(groups, device=layer.input_scale.device)
    try:
        yield
    finally:
        for layer in layers:
            layer.groups = None


def forget(model: nn.Module) -> None:
    """Look anew for the model's layers when next they are needed."""
    _STEPPED.pop(model, None)


def _stepped(model: nn.Module) -> tuple[Fp8Linear, ...]:
    found = _STEPPED.get(model)
    if found is None:
        layers = (layer for layer in model.modules() if isinstance(layer, Fp8Linear))
        found = _STEPPED[model] = tuple(layer for layer in layers if layer.spec.step_sigmas)
    return found
