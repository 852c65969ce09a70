"""A unit's weights in one flat buffer, and its modules' tensors pointed at it.

A unit is what enters and leaves the device in one piece: a block, a layer. All its tensors lie one after the other in a
buffer of bytes, so that the unit moves by a single copy, and the same bytes can be looked at wherever they are: at home
in host memory, in a slot on the device. Pointing a module at a buffer replaces entries of its dictionaries of
parameters and buffers; no number is touched, so whatever is computed has the same bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from octavo.fp8 import Fp8Linear
from octavo.fp8.scale import Scaled

ALIGNMENT = 256  # bytes: what kernels that read whole lines like, and more than any dtype needs

Pointing = Sequence[tuple[dict[str, Any], str, Any]]
"""Entries of modules' dictionaries: where, by which name, what."""


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Modules whose weights move together.

    Attributes:
        name: of the first module within the model.
        modules: each is called by itself, one after the other.
        without: modules inside of these whose weights do not move with them.
        alone: whether only the modules' own tensors are meant, and none of those inside of them.
    """

    name: str
    modules: tuple[nn.Module, ...]
    without: tuple[nn.Module, ...] = ()
    alone: bool = False

    def inside(self) -> Iterator[nn.Module]:
        """Every module whose own tensors belong to the unit."""
        left_out = {id(part) for module in self.without for part in module.modules()}
        seen = set[int]()
        for module in self.modules:
            for part in (module,) if self.alone else module.modules():
                if id(part) not in left_out and id(part) not in seen:
                    seen.add(id(part))
                    yield part

    def tensors(self) -> list[Tensor]:
        """What moves: all tensors but calibrated input scales, which are a few bytes that others look at."""
        return [tensor for spot in _spots(self) for tensor in spot.tensors]


@dataclass(frozen=True, slots=True, eq=False)
class _Spot:
    """One entry of a module that holds tensors."""

    owner: dict[str, Any]
    key: str
    kind: Literal["parameter", "buffer", "twin"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        value = self.owner[self.key]
        return (value.q, value.scale) if isinstance(value, Scaled) else (value,)

    def made_of(self, tensors: Sequence[Tensor]) -> Any:
        """The same entry of other tensors."""
        if self.kind == "twin":
            return Scaled(tensors[0], tensors[1], self.owner[self.key].block)
        return nn.Parameter(tensors[0], requires_grad=False) if self.kind == "parameter" else tensors[0]


def _spots(unit: Unit) -> list[_Spot]:
    return [
        spot for module in unit.inside() for spot in spots_of(module) if all(_has_memory(each) for each in spot.tensors)
    ]


def spots_of(module: nn.Module) -> Iterator[_Spot]:
    """The module's own tensors that may move, with or without memory."""
    stays = ("input_scale",) if isinstance(module, Fp8Linear) else ()
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield _Spot(module._parameters, key, "parameter")
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in stays:
            yield _Spot(module._buffers, key, "buffer")
    if isinstance(module, Fp8Linear) and module.twin is not None:
        yield _Spot(module.__dict__, "twin", "twin")


def _has_memory(tensor: Tensor) -> bool:
    """Whether there are bytes to move: none are on meta, and what oneDNN packed for itself nobody else can copy."""
    return not tensor.is_meta and tensor.layout is torch.strided


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where one tensor lies in a buffer."""

    start: int  # bytes
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The tensor, as a view of the buffer."""
        typed = flat[self.start : self.start + self.nbytes].view(self.dtype)
        return typed.as_strided(self.shape, self.stride)


class Layout:
    """Where each tensor of a unit lies in a flat buffer; made of a unit whose weights are anywhere.

    Attributes:
        nbytes: of the buffer.
    """

    def __init__(self, unit: Unit) -> None:
        self._spots = _spots(unit)
        self._pieces: list[tuple[_Piece, ...]] = []
        end = 0
        for spot in self._spots:
            pieces = []
            for tensor in spot.tensors:
                piece = _piece(tensor, -(-end // ALIGNMENT) * ALIGNMENT)
                end = piece.start + piece.nbytes
                pieces.append(piece)
            self._pieces.append(tuple(pieces))
        self.nbytes = end

    def gather(self, flat: Tensor) -> None:
        """Copy the unit's tensors, wherever they are now, into a buffer."""
        for spot, pieces in zip(self._spots, self._pieces, strict=True):
            for piece, tensor in zip(pieces, spot.tensors, strict=True):
                piece.of(flat).copy_(tensor)

    def pointing(self, flat: Tensor) -> Pointing:
        """The entries that make the unit's modules read from a buffer."""
        return [
            (spot.owner, spot.key, spot.made_of([piece.of(flat) for piece in pieces]))
            for spot, pieces in zip(self._spots, self._pieces, strict=True)
        ]


def point(pointing: Pointing) -> None:
    """Let modules read from where the pointing says."""
    for owner, key, value in pointing:
        owner[key] = value


def _piece(tensor: Tensor, start: int) -> _Piece:
    """The strides are kept: another order of the same numbers might be multiplied in another way."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = last + 1 if tensor.numel() else 0
    return _Piece(start, count * tensor.dtype.itemsize, tensor.dtype, tuple(tensor.shape), tensor.stride())
