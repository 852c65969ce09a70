"""NaN and infinity, noticed once a step and traced to a layer only when they have appeared.

denoised = step()
if not all_finite(denoised):                       # one reduction over the latents: nothing worth naming
    with watch(mmdit) as culprit:
        step()                                     # once more, slower
    raise NumericsError(f"... {culprit}")
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from octavo.fp8.linear import Fp8Linear


def all_finite(x: Tensor) -> bool:
    """Whether `x` holds neither NaN nor infinity."""
    return bool(torch.isfinite(x).all())


class Culprit:
    """The first layer that made something not finite out of finite numbers."""

    def __init__(self) -> None:
        self.name: str | None = None  # as `named_modules` has it; None while none was found
        self.layer: nn.Module | None = None
        self.largest_input: float | None = None  # absolute value

    def __str__(self) -> str:
        if self.name is None:
            return "No layer's output was NaN or infinite: the number came from the work between the layers."
        assert self.layer is not None
        kind = type(self.layer).__name__
        detail = ""
        if isinstance(self.layer, Fp8Linear) and self.layer.choice is not None:
            detail = f" on the path '{self.layer.choice.backend.name}'"
        return f"The first NaN or infinity left '{self.name}' ({kind}{detail}); its largest input was {self.input}."

    @property
    def input(self) -> str:
        """The largest input in words."""
        return "unknown" if self.largest_input is None else f"{self.largest_input:.4g}"


@contextmanager
def watch(model: nn.Module) -> Iterator[Culprit]:
    """Look at the output of every layer without parts of its own; slow, for one rerun of a step that went wrong."""
    culprit = Culprit()

    def look(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if culprit.name is not None or not isinstance(output, Tensor) or all_finite(output):
            return
        sizes = [float(x.detach().abs().amax()) for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
        culprit.name, culprit.layer = name, layer
        culprit.largest_input = max(sizes, default=None)

    def hook(name: str) -> Any:
        return lambda layer, inputs, output: look(name, layer, inputs, output)

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        yield culprit
    finally:
        for handle in handles:
            handle.remove()
