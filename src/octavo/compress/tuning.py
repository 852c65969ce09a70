"""The loop of a fine-tuning: Adam over named parameters, the step sizes falling to zero, and a state that survives.

Chance comes from (seed, step) alone and the state is kept bit for bit, so that a run that was killed and started again
gives the same parameters as one that was not.

Source: Kingma & Ba 2015 (arXiv 1412.6980) for Adam.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from octavo.checkpoint.save import save_safetensors
from octavo.errors import NumericsError

BETAS = (0.9, 0.99)
EPSILON = 1e-12  # losses are relative to the first one, so gradients are never small by their unit
WARM_UP = 20  # steps in which the step size rises
LEVEL = 0.5  # share of the steps before it falls, linearly, to zero
PART_OF_SIXTEEN = 16  # states kept in a run

LossOfStep = Callable[[int], float]  # the step's number → its loss, gradients left in the parameters


@dataclass(slots=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    first_loss: float = 0.0  # what losses are relative to
    loss: float = 1.0  # relative, averaged over the last steps


def tune(
    parameters: Mapping[str, nn.Parameter],
    loss_of_step: LossOfStep,
    *,
    steps: int,
    rate: float,
    state: Path,
    watch: Callable[[int, float], object],
    save_every: int | None = None,
) -> float:
    """Train for `steps` in all; call again with the same arguments to go on where `state` was saved.

    Args:
        parameters: by name; changed in place.
        loss_of_step: draws the batch of a step, leaves the gradients of its loss and gives the loss.
        steps: in all, those of earlier calls included.
        rate: largest change of a parameter in a step.
        state: the file for it.
        watch: told the steps done and the loss relative to the first steps'.
        save_every: steps between saves; a sixteenth of all when not given.

    Returns:
        The last relative loss, averaged over some steps.

    Raises:
        NumericsError: the loss or a gradient is not finite.
    """
    save_every = save_every or max(1, steps // PART_OF_SIXTEEN)
    adam = _Adam(parameters)
    progress = _resume(state, parameters, adam)
    while progress.step < steps:
        watch(progress.step, progress.loss)
        loss = loss_of_step(progress.step)
        if not math.isfinite(loss):
            raise NumericsError(f"The loss is {loss} at step {progress.step}. Use a smaller learning rate.")
        if progress.step == 0:
            progress.first_loss = loss or 1.0
        adam.step(rate * _factor(progress.step, steps), 1 / progress.first_loss)
        memory = 1 - 1 / min(progress.step + 1, 20)
        progress.loss = memory * progress.loss + (1 - memory) * loss / progress.first_loss
        progress.step += 1
        if progress.step % save_every == 0 or progress.step == steps:
            _save(state, parameters, adam, progress)
    watch(progress.step, progress.loss)
    return progress.loss


def _factor(step: int, steps: int) -> float:
    """Of the step size: a linear rise, level, then linearly to zero."""
    return min(1.0, (step + 1) / WARM_UP, (1 - step / steps) / (1 - LEVEL))


class _Adam:
    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float, unit: float) -> None:
        """One update from the gradients times `unit`, which are spent."""
        self.steps += 1
        beta1, beta2 = BETAS
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad * unit
            first, second = self.first[name].lerp_(gradient, 1 - beta1), self.second[name]
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            spread = (second / (1 - beta2**self.steps)).sqrt_().add_(EPSILON)
            parameter.addcdiv_(first, spread, value=-rate / (1 - beta1**self.steps))
            parameter.grad = None


def _save(path: Path, parameters: Mapping[str, nn.Parameter], adam: _Adam, progress: Progress) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"value|{name}"] = parameter.detach()
        tensors |= {f"first|{name}": adam.first[name], f"second|{name}": adam.second[name]}
    standing = {name: getattr(progress, name) for name in Progress.__slots__}
    save_safetensors(path, tensors, {"progress": json.dumps(standing)})


def _resume(path: Path, parameters: Mapping[str, nn.Parameter], adam: _Adam) -> Progress:
    if not path.exists():
        return Progress()
    with safe_open(path, framework="pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"value|{name}"))
                adam.first[name].copy_(file.get_tensor(f"first|{name}"))
                adam.second[name].copy_(file.get_tensor(f"second|{name}"))
    adam.steps = progress.step
    return progress
