"""Fused steps for a model that was loaded: where `fp8.fused` meets the blocks of `models.ops`."""

from collections.abc import Callable

import torch
from torch import nn

from octavo.fp8.fused import fuse
from octavo.fp8.verdicts import unfit
from octavo.models.ops import PLAIN, QKV, each_with_ops, use_ops


def fuse_steps(
    model: nn.Module, device: torch.device, dtype: torch.dtype, *, rows: Callable[[str], int], measure: bool | None
) -> list[str]:
    """Let the blocks of `model` take fused steps where that pays; call it after `fp8.prepare`.

    Args:
        model: an MMDiT or a ControlNet; others have no such steps, and nothing happens.
        device: where it runs; its weights may lie in host memory.
        dtype: of its activations.
        rows, measure: as of `fp8.prepare`.

    Returns:
        What the log says of it.
    """
    if not each_with_ops(model):
        return []
    if (why := unfit(device, dtype)) is not None:
        return [f"steps between products are plain: a fused one {why}"]
    ops = fuse(model, PLAIN, QKV, device=device, dtype=dtype, rows=rows, measure=measure)
    use_ops(model, ops)
    paths = ops.paths()
    return [str(paths), *paths.details]
