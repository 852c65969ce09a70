"""Fused steps for a model that was loaded: where `fp8.fused` meets the blocks of `models.ops`."""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from octavo.fp8.fused import fuse
from octavo.fp8.verdicts import unfit
from octavo.models.ops import QKV, Ops, each_with_ops, use_ops


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
    parts = each_with_ops(model)
    if not parts:
        return []
    if (why := unfit(device, dtype)) is not None:
        return [f"steps between products are plain: a fused one {why}"]
    # Those that it has say how it attends.
    ops = fuse(model, cast(Ops, parts[0].ops), QKV, device=device, dtype=dtype, rows=rows, measure=measure)
    use_ops(model, ops)
    paths = ops.paths()
    return [str(paths), *paths.details]
