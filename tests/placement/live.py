"""Follows what torch's operations allocate and read: how many bytes live at most, how many pass through memory."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What computes rather than moves; views move nothing.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "attention", "embedding", "linear")


class Live(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        peak: most bytes that lived together of what was allocated meanwhile.
        moved: bytes that operations other than products read and wrote.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.moved = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        before = {id(each.untyped_storage()) for each in given}
        views = all(id(each.untyped_storage()) in before for each in made)
        in_place = func.__name__.split(".")[0].endswith("_") or "out" in (kwargs or {})
        if (not views or in_place) and not any(name in func.__name__ for name in PRODUCTS):
            self.moved += sum(map(_nbytes, (*given, *made)))
        for each in made:
            storage = each.untyped_storage()
            if id(storage) not in before and storage not in self._known:
                self._arrived(storage)
        return out

    def _arrived(self, storage: Any) -> None:
        nbytes = storage.nbytes()
        self._known[storage] = nbytes
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._left, nbytes)

    def _left(self, nbytes: int) -> None:
        self.now -= nbytes


def _nbytes(tensor: Tensor) -> int:
    """Of the numbers that are there: one that is repeated along an axis is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.itemsize


def peak_of(run: Callable[[], object]) -> int:
    """Most bytes that live together of what `run` allocates."""
    with torch.inference_mode(), Live() as live:
        kept = run()  # noqa: F841  # what it gives is part of what lives
    return live.peak
