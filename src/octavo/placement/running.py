"""How a loaded model runs, apart from its products: how it attends, whether it is compiled or captured.

Two calls after loading, around those that others make (see `pipeline.components`): `attend` before steps between
products are fused, `start` when all else is settled.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from octavo.fp8.needs import Mode
from octavo.models import MMDiT
from octavo.models.attention import Attend
from octavo.models.ops import PLAIN, PlainOps, each_with_ops, use_ops
from octavo.placement.attention import Attending, Case, attention_called, choose_attention
from octavo.placement.compiled import INDUCTOR, compile_blocks, compile_refusal
from octavo.placement.graphs import Seam, capture

HEAD_WIDTH = 64  # of all released models


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What a user may say of it."""

    attention: str | None = None  # name of the way to attend; None: by measured times, among those that the mode allows
    compile: bool | str = False  # torch.compile's backend, True for inductor
    graphs: bool | None = None  # capture CUDA graphs; None: on CUDA devices

    def __post_init__(self) -> None:
        if self.attention is not None:
            attention_called(self.attention)

    @property
    def compiler(self) -> str | None:
        """The backend of torch.compile, if it is wanted."""
        return INDUCTOR if self.compile is True else self.compile or None

    def refusal(self, device: torch.device, dtype: torch.dtype, width: int = HEAD_WIDTH) -> str | None:
        """Why what was asked for cannot be done on `device`; None where it can.

        Args:
            dtype: of queries, keys and values.
            width: of a head.
        """
        if self.attention is not None:
            case = Case(dtype=dtype, device="", width=width, by_name=True).on(device)
            if (why := attention_called(self.attention).refusal(case)) is not None:
                return f"--attention {self.attention}: {why}"
        if self.compiler is not None and (why := compile_refusal(device, self.compiler)) is not None:
            return f"--compile: {why}"
        return None


def attend(model: nn.Module, device: torch.device, mode: Mode, running: Running) -> list[str]:
    """Let the blocks of `model` choose how they attend, for each shape that occurs; call it before steps are fused.

    Returns:
        What the log says of it; nothing for models without such blocks.

    Raises:
        RequestError: the way that was asked for cannot serve here.
    """
    if not each_with_ops(model):
        return []
    wanted = None if running.attention is None else attention_called(running.attention)
    if wanted is None and device.type != "cuda":
        return []  # the definition, at no cost
    if wanted is not None:
        dtype = next(model.parameters()).dtype
        choose_attention(Case(dtype=dtype, device="", width=_head_width(model)).on(device), wanted=wanted)
    attending: Attend = Attending(device, mode, wanted)
    if running.compiler is not None:  # which cannot look into the choice
        attending = torch.compiler.disable(partial(_attend, attending))  # type: ignore[no-untyped-call]
    use_ops(model, PlainOps(attending))
    return ["attention: " + ("by measured times for each shape" if wanted is None else wanted.name)]


def start(
    model: nn.Module, device: torch.device, mode: Mode, running: Running, *, seam: Seam | None = None
) -> list[str]:
    """Compile and capture, as far as it is wanted; call it when all else is settled.

    A compiled model takes the steps between its products as they are defined, for the compiler to fuse.

    Args:
        seam: what graphs are captured by; CUDA when not given.

    Returns:
        What the log says of it.

    Raises:
        RequestError: nothing can be compiled here.
    """
    if not each_with_ops(model):
        return []
    told = []
    if running.compiler is not None:
        use_ops(model, PLAIN)
        attend(model, device, mode, running)
        count = compile_blocks(model, device, running.compiler)
        told.append(f"{count} blocks compiled by {running.compiler} at the first step of each shape")
    # ControlNets are not captured: one takes part of the MMDiT as an argument, whose end its graphs would outlive.
    wanted = device.type == "cuda" or seam is not None if running.graphs is None else running.graphs
    if wanted and isinstance(model, MMDiT):
        captured = capture(model, seam=seam)
        told.append(f"CUDA graphs: captured at call {captured.limits.after} of a shape")
    return told


def _attend(attending: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attending(q, k, v)


def _head_width(model: nn.Module) -> int:
    config = model.config
    return int(config.width) // int(config.heads)  # type: ignore[union-attr, arg-type]
