"""How a part of a file becomes a model: settled from headers and scales alone, before any weight is read.

A plan holds the model on the meta device, its FP8 layers in their places, and for each of its tensors where that comes
from. Making it finds everything that can be wrong with a file but its values; `load` follows it, `describe` reports it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from octavo.checkpoint.detect import Config, detect
from octavo.checkpoint.header import Entry
from octavo.checkpoint.kinds import TITLES, Kind
from octavo.checkpoint.layout import Names, Piece
from octavo.checkpoint.scales import FP8_DTYPES, ScaleRules, WeightRule
from octavo.checkpoint.source import Located
from octavo.checkpoint.stacking import ScaledRows, Stretch, stack_scales
from octavo.checkpoint.tensors import torch_dtype
from octavo.errors import CorruptFileError, UnsupportedFormatError, WrongModelError
from octavo.fp8 import FORMATS, LinearSpec
from octavo.fp8.scale import BLOCK, Block
from octavo.models import VAE, ClipTextEncoder, ControlNet, MMDiT, T5Encoder
from octavo.quantize import convert

READABLE = frozenset({"F16", "BF16", "F32", "F64", *FP8_DTYPES})
MODELS: Mapping[Kind, Callable[[Any], nn.Module]] = {
    "mmdit": MMDiT,
    "clip_l": ClipTextEncoder,
    "clip_g": ClipTextEncoder,
    "t5": T5Encoder,
    "vae": VAE,
    "controlnet": ControlNet,
}
SHOWN = 3  # names in a message about many


@dataclass(frozen=True, slots=True)
class Slab:
    """Some rows of a tensor in a file."""

    entry: Entry
    start: int
    stop: int
    transposed: bool  # the file has it as [in, out]
    rule: WeightRule | None  # of an FP8 tensor

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        all_rows = self.entry.shape[-1 if self.transposed else 0]
        return math.prod(self.entry.shape) // all_rows * self.rows

    @property
    def scaled_rows(self) -> ScaledRows:
        """For `stacking.stack_scales`; codes without scale are the values."""
        scale = None if self.rule is None else self.rule.scale
        block = None if self.rule is None else self.rule.block
        ends = self.stop == self.entry.shape[0]
        return ScaledRows(torch.ones(()) if scale is None else scale, block, self.start, self.stop, ends)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tensor of the model comes from: slabs, one upon the other."""

    ours: str
    slabs: tuple[Slab, ...]
    stays_fp8: bool

    @property
    def module(self) -> str:
        return self.ours.rpartition(".")[0]

    @property
    def scaling(self) -> tuple[Tensor, Block | None]:
        """The scale of the whole matrix, and what shares one where that is a block; see `stacking.stack_scales`."""
        return stack_scales([slab.scaled_rows for slab in self.slabs], self.slabs[0].entry.shape[-1], self.ours)

    @property
    def input_scale(self) -> Tensor | None:
        """Of the whole, [], or [G] with `step_sigmas`; None unless every slab has one."""
        scales = [slab.rule.input_scale for slab in self.slabs if slab.rule and slab.rule.input_scale is not None]
        if len(scales) != len(self.slabs):
            return None
        # Queries, keys and values share an input; where they were calibrated apart, the largest keeps all in range.
        return torch.stack(scales).amax(0) if self.step_sigmas else torch.stack([each.amax() for each in scales]).amax()

    @property
    def step_sigmas(self) -> tuple[float, ...]:
        """Levels at which the input's scale changes; none where the slabs do not agree on them."""
        levels = {() if slab.rule is None else slab.rule.step_sigmas for slab in self.slabs}
        return levels.pop() if len(levels) == 1 else ()

    @property
    def low_rank(self) -> int:
        """Largest rank of the slabs' branches; 0 where none has one."""
        return max(0 if branch is None else branch.rank for branch, _, _ in self.stretches)

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """The slabs' branches, for `stacking.stack_branches`."""
        return tuple(
            Stretch(None if slab.rule is None else slab.rule.low_rank, slab.start, slab.stop) for slab in self.slabs
        )

    @property
    def spec(self) -> LinearSpec:
        """How the layer that this is the FP8 matrix of keeps it."""
        scale, block = self.scaling
        return LinearSpec(
            format=FORMATS[torch_dtype(self.slabs[0].entry)],
            granularity="block" if block else "row" if scale.ndim else "tensor",
            block=block or BLOCK,
            input_scale=self.input_scale is not None,
            step_sigmas=self.step_sigmas,
            full_precision=any(slab.rule is not None and slab.rule.full_precision for slab in self.slabs),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """How one part becomes a model.

    Attributes:
        located: the part and its file.
        config: the model's configuration.
        model: on the meta device, FP8 layers in their places.
        origins: one for each of its weights, in the order of the file.
        linears: names of all its linear layers, FP8 or not.
        fp8_form: the FP8 form in words; None without FP8.
        surplus: names in the file, scales and descriptions included, that the model has no use for.
    """

    located: Located
    config: Config
    model: nn.Module
    origins: tuple[Origin, ...]
    linears: tuple[str, ...]
    fp8_form: str | None
    surplus: tuple[str, ...] = ()

    @property
    def fp8_linears(self) -> tuple[str, ...]:
        """Names of the layers that stay FP8 in memory."""
        return tuple(origin.module for origin in self.origins if origin.stays_fp8)


def plan_part(located: Located) -> Plan:
    """How the part becomes a model.

    Raises:
        CorruptFileError: tensors are missing, of shapes that do not fit together, or FP8 without a scale.
        WrongModelError: tensors are there that the model has no place for.
        UnsupportedFormatError: a number format that is not read.
    """
    part = located.part
    rules = ScaleRules(located.file, part)
    names = Names(part)
    config = detect(located.file, names)
    with torch.device("meta"):
        model = MODELS[part.kind](config)
    linears = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    matrices = {f"{name}.weight" for name in linears}

    state = model.state_dict()
    pieces = {ours: names.pieces(ours) for ours in state}
    used = frozenset(piece.name for several in pieces.values() for piece in several)
    _refuse_missing(located, used)
    _refuse_surplus(located, names.surplus(used | rules.auxiliary))
    origins = [
        _origin(located, rules, ours, pieces[ours], tensor, linear=ours in matrices) for ours, tensor in state.items()
    ]
    convert(model, {origin.module: origin.spec for origin in origins if origin.stays_fp8})
    layers = {name.removesuffix(".weight") for name in used}
    known = used | {name for name in rules.auxiliary if name.endswith("scaled_fp8")}
    surplus = (name for name in located.part.names - known if name.rpartition(".")[0] not in layers)
    return Plan(located, config, model, tuple(sorted(origins, key=_place)), linears, rules.form, tuple(sorted(surplus)))


def _origin(
    located: Located, rules: ScaleRules, ours: str, pieces: tuple[Piece, ...], tensor: Tensor, *, linear: bool
) -> Origin:
    slabs = []
    for piece in pieces:
        entry = located.file.entries[piece.name]
        if entry.dtype not in READABLE:
            raise UnsupportedFormatError(
                f"'{entry.file}' keeps '{entry.name}' as {entry.dtype}, where Octavo reads "
                f"{', '.join(sorted(READABLE))}. Use a 16-bit or FP8 version of the model."
            )
        shape = entry.shape[::-1] if piece.transposed else entry.shape
        # diffusers keeps the 1×1 convolutions of a VAE's attention as linears.
        if not shape or _without_ones(shape[1:]) != _without_ones(tuple(tensor.shape[1:])):
            _refuse_shape(entry, tensor)
        rule = rules.rule(piece.name, linear=linear) if entry.dtype in FP8_DTYPES else None
        half = shape[0] // 2
        start, stop = (0, shape[0]) if piece.half is None else (piece.half * half, (piece.half + 1) * half)
        slabs.append(Slab(entry, start, stop, piece.transposed, rule))
    if sum(slab.rows for slab in slabs) != tensor.shape[0]:
        _refuse_shape(slabs[0].entry, tensor)
    dtypes = {slab.entry.dtype for slab in slabs}
    stays_fp8 = linear and len(dtypes) == 1 and dtypes <= FP8_DTYPES and not any(slab.transposed for slab in slabs)
    return Origin(ours, tuple(slabs), stays_fp8)


def _refuse_missing(located: Located, needed: frozenset[str]) -> None:
    missing = sorted(needed - located.part.names)
    if missing:
        raise CorruptFileError(
            f"'{located.file.path}' lacks {len(missing)} of the {len(needed)} tensors of its "
            f"{TITLES[located.part.kind]}: {_some(missing)}. Download the file again, or use another version of it."
        )


def _refuse_surplus(located: Located, surplus: Sequence[str]) -> None:
    if surplus:
        raise WrongModelError(
            f"'{located.file.path}' looks like SD3's {TITLES[located.part.kind]}, but has {len(surplus)} tensors that "
            f"it has no place for: {_some(surplus)}. It is of another model; use the file that belongs to SD3 or SD3.5."
        )


def _refuse_shape(entry: Entry, tensor: Tensor) -> NoReturn:
    raise CorruptFileError(
        f"'{entry.file}' has '{entry.name}' of shape {list(entry.shape)}, which does not fit the rest of the model: "
        f"what is made of it must have shape {list(tensor.shape)}. The file is damaged or mixes two models: "
        "download it again, or use another version of it."
    )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _place(origin: Origin) -> tuple[Path, int]:
    entry = origin.slabs[0].entry
    return entry.file, entry.start


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
