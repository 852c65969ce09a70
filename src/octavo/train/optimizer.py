"""Muon for matrices, AdamW for everything else, and a running average of the weights.

State is plain tensors under string keys, so that a run is kept in safetensors and resumes bit for bit.

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Loshchilov & Hutter 2019
(arXiv 1711.05101) for AdamW.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Step sizes and memories of both rules."""

    matrix_rate: float = 0.02  # Muon's step: the spectral norm of an update of a square matrix
    other_rate: float = 1.5e-3  # AdamW's
    momentum: float = 0.95  # Muon's
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0  # norm over all gradients
    average: float = 0.999  # memory of the running average of the weights


class Optimizer:
    """Updates named parameters in place from their `.grad`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], matrices: Collection[str], settings: OptimizerSettings):
        self.settings = settings
        self.parameters = dict(parameters)
        self.steps = 0
        self.matrices = [name for name in self.parameters if name in matrices]
        self.others = [name for name in self.parameters if name not in matrices]
        self.momentum = {name: torch.zeros_like(self.parameters[name]) for name in self.matrices}
        self.first = {name: torch.zeros_like(self.parameters[name]) for name in self.others}
        self.second = {name: torch.zeros_like(self.parameters[name]) for name in self.others}
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def step(self, factor: float) -> float:
        """One update; gradients are spent.

        Args:
            factor: of both step sizes, for warm-up and decay.

        Returns:
            Norm of all gradients before clipping.
        """
        self.steps += 1
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (self.settings.clip / (norm + 1e-6)).clamp(max=1.0))
        by_name = dict(zip(self.parameters, gradients, strict=True))
        self._step_matrices(by_name, factor)
        self._step_others(by_name, factor)
        # Early on the average follows quickly, so that it does not remember the random start.
        memory = min(self.settings.average, (1 + self.steps) / (10 + self.steps))
        averages = [self.average[name] for name in self.parameters]
        torch._foreach_lerp_(averages, list(self.parameters.values()), 1 - memory)
        for parameter in self.parameters.values():
            parameter.grad = None
        return float(norm)

    def _step_matrices(self, gradients: Mapping[str, Tensor], factor: float) -> None:
        by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name in self.matrices:
            momentum = self.momentum[name]
            momentum.lerp_(gradients[name], 1 - self.settings.momentum)
            by_shape[(momentum.shape[0], momentum[0].numel())].append(name)
        for (rows, columns), names in by_shape.items():
            # Nesterov: look one step ahead of the momentum.
            updates = torch.stack(
                [gradients[n].lerp(self.momentum[n], self.settings.momentum).reshape(rows, columns) for n in names]
            )
            rate = self.settings.matrix_rate * factor * max(1.0, rows / columns) ** 0.5
            for name, update in zip(names, orthogonal(updates), strict=True):
                parameter = self.parameters[name]
                parameter.mul_(1 - rate * self.settings.weight_decay)
                parameter.sub_(update.reshape(parameter.shape), alpha=rate)

    def _step_others(self, gradients: Mapping[str, Tensor], factor: float) -> None:
        beta1, beta2 = self.settings.betas
        rate = self.settings.other_rate * factor
        parameters: list[Tensor] = [self.parameters[name] for name in self.others]
        grads = [gradients[name] for name in self.others]
        first, second = [self.first[name] for name in self.others], [self.second[name] for name in self.others]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        spread = torch._foreach_sqrt(second)
        torch._foreach_div_(spread, (1 - beta2**self.steps) ** 0.5)
        torch._foreach_add_(spread, 1e-8)
        torch._foreach_mul_(parameters, 1 - rate * self.settings.weight_decay)
        torch._foreach_addcdiv_(parameters, first, spread, -rate / (1 - beta1**self.steps))

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs besides the parameters: flat, contiguous tensors."""
        parts = {"momentum": self.momentum, "first": self.first, "second": self.second, "average": self.average}
        state = {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
        return state | {"steps": torch.tensor(self.steps)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        for part in ("momentum", "first", "second", "average"):
            for name, tensor in getattr(self, part).items():
                tensor.copy_(state[f"{part}.{name}"])
        self.steps = int(state["steps"])


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Push all singular values of each matrix [N, rows, columns] towards 1, in bfloat16, by Newton-Schulz."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result.to(matrices.dtype)
