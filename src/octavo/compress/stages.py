"""A part of a file evaluated stage by stage: weights are read when their stage's turn comes, and dropped again.

A model larger than memory can so be run on many inputs at once: every stage meets all of them before the next one is
read. Where the whole model fits into memory its weights stay, and the same code runs without reading them again. What
the stages are and what they compute, `blocks` says for MMDiTs, `control_blocks` for ControlNets.

b rows of a batch, L text tokens, n image tokens, D width, h and w latent pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.checkpoint.plan import Origin, plan_part
from octavo.checkpoint.source import Located
from octavo.checkpoint.tensors import torch_dtype
from octavo.devices import free_bytes, trim_memory
from octavo.errors import RequestError

EMBED = "embed"  # the stage of what embeds the inputs, which is not one module
SPARE = 2 << 30  # bytes that stay free beside a model that is kept in memory


@dataclass(slots=True)
class Batch:
    """Rows that share a call of the model, and where they stand in it."""

    latents: Tensor  # [b, 16, h, w]
    sigma: Tensor  # [b] float32
    context: Tensor  # [b, L, C]
    pooled: Tensor  # [b, P]
    group: int = 0  # of steps, for those who keep them apart
    skip_layers: tuple[int, ...] = ()  # blocks that hand on what they get
    vector: Tensor | None = None  # [b, D] from here on: set by the stage "embed"
    text: Tensor | None = None  # [b, L, D]
    image: Tensor | None = None  # [b, n, D]
    velocity: Tensor | None = None  # [b, 16, h, w], set by an MMDiT's last stage
    hint: Tensor | None = None  # [b, 16, h, w], what a ControlNet follows
    residuals: tuple[Tensor, ...] = ()  # [b, n, D] each, set by a ControlNet's blocks

    def branch(self) -> "Batch":
        """Another batch that stands at the same place; stages never write into tensors."""
        return Batch(
            self.latents,
            self.sigma,
            self.context,
            self.pooled,
            self.group,
            self.skip_layers,
            self.vector,
            self.text,
            self.image,
            hint=self.hint,
            residuals=self.residuals,
        )


class Stages(ABC):
    """A part of a file, in stages; close its file when done.

    Args:
        located: a part in 16 or 32 bits.
        device: where it is evaluated.
        dtype: of the arithmetic.
        keep: whether weights stay once they are read; None for yes if the model fits into free memory.

    Attributes:
        plan: of the part.
        model: on the meta device, but for the stages that are loaded.
        stages: their names in order: what embeds the inputs, the blocks, and what comes after them.

    Raises:
        RequestError: the model is in FP8 already.
        CheckpointError: what `plan_part` finds wrong with it.
    """

    def __init__(self, located: Located, device: torch.device, dtype: torch.dtype, *, keep: bool | None = None) -> None:
        self.plan = plan_part(located)
        if self.plan.fp8_form is not None:
            raise RequestError(
                f"'{located.file.path}' is FP8 already ({self.plan.fp8_form}). What rounding took cannot be brought "
                "back: quantize the 16-bit version of the model."
            )
        self.model = self.plan.model
        self.device, self.dtype = device, dtype
        self.nbytes = sum(t.numel() for t in self.model.state_dict().values()) * dtype.itemsize
        if keep is None:
            free = free_bytes(device)
            keep = free is None or self.nbytes + SPARE < free
        self.keep = keep
        self._origins: dict[str, list[Origin]] = {stage: [] for stage in self.names_of_stages()}
        for origin in self.plan.origins:
            self._origins[self.stage_of(origin.ours)].append(origin)
        self.stages = tuple(self._origins)

    @abstractmethod
    def names_of_stages(self) -> Iterable[str]:
        """See `stages`."""

    @abstractmethod
    def stage_of(self, name: str) -> str:
        """The stage that one of our names (of a layer, or of a tensor) belongs to."""

    @abstractmethod
    def advance(self, stage: str, batches: Iterable[Batch], before: Callable[[Batch], object] = lambda _: None) -> None:
        """Take every batch through a stage that is loaded; `before` is called with each as its turn comes."""

    def linears(self, stage: str) -> list[str]:
        """Names of the linear layers of a stage, in the order of the model."""
        return [name for name in self.plan.linears if self.stage_of(name) == stage]

    def module(self, stage: str) -> nn.Module | None:
        """A block or the final layer; None for what embeds, which is not one module."""
        return None if stage == EMBED else self.model.get_submodule(stage)

    @contextmanager
    def replaced(self, stage: str, module: nn.Module) -> Iterator[None]:
        """Inside of the context `module` stands in the place of a block or of the final layer."""
        before = self.model.get_submodule(stage)
        self.model.set_submodule(stage, module, strict=True)
        try:
            yield
        finally:
            self.model.set_submodule(stage, before, strict=True)

    @contextmanager
    def loaded(self, stage: str) -> Iterator[None]:
        """The weights of `stage` are there inside of the context.

        Raises:
            CorruptFileError: a weight is NaN or infinite, or the file ends early.
        """
        for origin in self._origins[stage]:
            module, _, name = origin.ours.rpartition(".")
            owner = self.model.get_submodule(module)
            there = getattr(owner, name)
            if there.is_meta:
                weight = self.read(origin, torch.empty(there.shape, dtype=self.dtype, device=self.device))
                setattr(owner, name, nn.Parameter(weight, requires_grad=False))
        try:
            yield
        finally:
            if not self.keep:
                self._drop(stage)

    def release(self) -> None:
        """Give the memory of all weights back; they are read again when needed."""
        for stage in self.stages:
            self._drop(stage)

    def _drop(self, stage: str) -> None:
        for origin in self._origins[stage]:
            module, _, name = origin.ours.rpartition(".")
            owner = self.model.get_submodule(module)
            empty = torch.empty_like(getattr(owner, name), device="meta")
            setattr(owner, name, nn.Parameter(empty, requires_grad=False))
        trim_memory()

    def read(self, origin: Origin, out: Tensor) -> Tensor:
        """Fill `out` with a tensor of the model, converted to its dtype and device."""
        row = 0
        for slab in origin.slabs:
            rows = (slab.start, slab.stop)
            self.plan.located.file.read_into(slab.entry.name, out[row : row + slab.rows], rows=rows)
            row += slab.rows
        return out

    def weights(self, layer: str) -> tuple[Tensor, Tensor | None]:
        """Weight [N, K] and bias [N] (None without) of a linear layer on the device, in the dtypes of the file."""
        module, found = self.model.get_submodule(layer), dict[str, Tensor]()
        for origin in self._origins[self.stage_of(layer)]:
            if origin.module == layer:
                name = origin.ours.rpartition(".")[2]
                dtype = torch_dtype(origin.slabs[0].entry)
                place = torch.empty(getattr(module, name).shape, dtype=dtype, device=self.device)
                found[name] = self.read(origin, place)
        return found["weight"], found.get("bias")
