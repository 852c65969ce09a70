"""`torch.compile` of a model's blocks: inductor's kernels instead of ours between the products.

All blocks share one compiled function, so that the first step of a shape waits for one compilation or two, not for one
a block. A block at which something looks on, such as a LoRA, goes uncompiled: compiled code does not notice that.
"""

import importlib.util
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from octavo.errors import RequestError
from octavo.fp8 import Backend, Fp8Linear
from octavo.fp8.matmul import TORCH, TORCH_TRITON
from octavo.models import ControlNet, MMDiT
from octavo.models.mmdit import JointBlock, StreamBlock

logger = logging.getLogger(__name__)

INDUCTOR = "inductor"
# Ways to multiply by FP8 weights that are made of torch's own operators; the others' work cannot be looked into.
TRACED = ("plain", "plain-wide", "plain-w8a8", "torch")
# Whose rounding is one pass of its own: a compiler makes torch's one pass, too, and joins it with what comes before.
FUSED_ANYWAY = {TORCH_TRITON.name: TORCH}


def compile_refusal(device: torch.device, backend: str = INDUCTOR) -> str | None:
    """Why nothing can be compiled for `device`; None where it can."""
    if not torch._dynamo.is_dynamo_supported():  # type: ignore[attr-defined]
        return "torch.compile does not run on this system or this Python"
    if backend != INDUCTOR:
        return None
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "it needs the package triton, which is not installed"
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 7 else f"it needs compute capability 7.0, this device has {major}.{minor}"
    if device.type == "cpu":
        named = os.environ.get("CXX")
        found = [name for name in ([named] if named else ["g++", "clang++", "c++"]) if shutil.which(name)]
        return None if found else "it needs a C++ compiler (g++ or clang++), and there is none"
    return f"it makes code for CUDA devices and CPUs, this is {device.type}"


def compile_blocks(model: nn.Module, device: torch.device, backend: str = INDUCTOR) -> int:
    """Let the blocks of `model` run compiled; the first call of each shape compiles.

    Args:
        model: an MMDiT or a ControlNet; others are left as they are.
        backend: torch.compile's; "aot_eager" and "eager" trace without making code.

    Returns:
        How many blocks.

    Raises:
        RequestError: nothing can be compiled here; says why.
    """
    blocks = _blocks(model)
    if not blocks:
        return 0
    if (why := compile_refusal(device, backend)) is not None:
        raise RequestError(f"--compile is of no use here: {why}. Leave it out; nothing else depends on it.")
    for layer in (part for block in blocks for part in block.modules() if isinstance(part, Fp8Linear)):
        if layer.choice is not None and layer.choice.backend.name not in TRACED:
            layer.choice = replace(layer.choice, backend=_for_compilers(layer.choice.backend))
    for block in blocks:
        parts = weakref.WeakSet(block.modules())
        # No module, but a function in the place of its method, which must not keep its block alive.
        block.forward = partial(_forward, weakref.ref(block), _compiled(type(block).forward, backend), parts)
    return len(blocks)


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    if isinstance(model, MMDiT):
        return list(model.joint_blocks)
    if isinstance(model, ControlNet):
        return [block for block in model.blocks if isinstance(block, JointBlock | StreamBlock)]
    return []


def _for_compilers(backend: Backend) -> Backend:
    """The same backend: made of torch's operators where it may be, else called by compiled code as it is."""
    if backend.name in FUSED_ANYWAY:
        return FUSED_ANYWAY[backend.name]
    if backend.name not in _OPAQUE:
        run = torch.compiler.disable(backend.run)  # type: ignore[no-untyped-call]
        _OPAQUE[backend.name] = replace(backend, run=run)
    return _OPAQUE[backend.name]


_OPAQUE: dict[str, Backend] = {}  # so that layers that multiply alike have one and the same, as before


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compile(function, backend=backend)
    return made


def _forward(
    of: "weakref.ref[nn.Module]", compiled: Callable[..., Any], parts: "weakref.WeakSet[nn.Module]", *args: Any
) -> Any:
    block = of()
    assert block is not None
    watched = torch.is_grad_enabled() or any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    return (type(block).forward if watched else compiled)(block, *args)
