"""One part of a file in other names: single file ↔ diffusers, 16-bit or FP8, without loss.

A matrix that is one here and three there is cut by rows, or stacked. Its FP8 scale goes along: one number for the
matrix is repeated, scales by row are cut; on the way back equal numbers become one, different ones a scale by row. So
codes and scales, and with them the weights, stay what they are to the last bit.

Written forms: plain FP8 stays plain. Scaled layers are described as ComfyUI does wherever that says everything (one
scale a matrix, no low-rank branch), in our own form otherwise. In diffusers folders `weight_scale` stands alone, with
our description only where there is something left to say.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NoReturn

import torch
from torch import Tensor

from octavo.checkpoint.kinds import Kind, Style
from octavo.checkpoint.layout import Piece, pieces_in
from octavo.checkpoint.octavo_form import DOWN, UP, LayerForm
from octavo.checkpoint.plan import Origin, Plan, Slab
from octavo.checkpoint.rewrite import Rows, Target, made
from octavo.checkpoint.scales import FP8_DTYPES, FP8_FORMATS
from octavo.checkpoint.stacking import ScaledRows, Stretch, stack_branches, stack_scales
from octavo.checkpoint.tensors import TensorFile, torch_dtype
from octavo.errors import RequestError, UnsupportedFormatError
from octavo.fp8 import Fp8Linear
from octavo.fp8.scale import Block
from octavo.models import MMDiTConfig, VAEConfig

FORMAT_NAMES: Mapping[str, str] = {dtype: name for name, dtype in FP8_FORMATS.items()}
Form = Literal["comfyui", "octavo", "bare"]  # how scaled layers are described; bare: by their scale alone


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows start to stop of a slab, counted in the slab."""

    slab: Slab
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def stretch(self) -> Stretch:
        branch = None if self.slab.rule is None else self.slab.rule.low_rank
        return Stretch(branch, self.slab.start + self.start, self.slab.start + self.stop)


@dataclass(frozen=True, slots=True)
class Translation:
    """A part as another file holds it.

    Attributes:
        targets: its tensors.
        forms: descriptions that belong into the header, by layer; those of the shard that holds the layer.
    """

    targets: tuple[Target, ...]
    forms: Mapping[str, LayerForm] = field(default_factory=dict)


def translate(
    plan: Plan,
    style: Style,
    prefix: str = "",
    *,
    dtype: torch.dtype | None = None,
    form: Form | None = None,
    without: Iterable[str] = (),
) -> Translation:
    """The part of `plan` in another layout.

    Args:
        plan: of the part; its file stays open until the targets are copied.
        style: of the names.
        prefix: of the names.
        dtype: of everything but FP8 codes and their scales; None keeps what is there.
        form: of scaled layers; None takes the one that says everything and is most widely read.
        without: our names of tensors to leave out.

    Raises:
        UnsupportedFormatError: pieces of one matrix differ in dtype.
        RequestError: `form` cannot say what a layer needs.
    """
    left_out = frozenset(without)
    whole = [
        _Whole(plan.located.file, *named)
        for origin in plan.origins
        if origin.ours not in left_out
        for named in _named(plan, origin, style, prefix)
    ]
    form = form or _fitting_form(whole, style)
    scaled = any(each.scaled for each in whole)
    targets: list[Target] = []
    forms: dict[str, LayerForm] = {}
    for each in whole:
        targets += each.targets(dtype, described=scaled and form == "comfyui", branch=form != "comfyui")
        if each.scaled and form == "comfyui":
            each.refuse_for_comfyui()
        if each.scaled and form == "octavo":
            forms[each.layer] = each.form
    return Translation(tuple(targets), forms)


def comfy_quant(layer: str, form: LayerForm) -> Target:
    """ComfyUI's description of one layer: JSON, as bytes."""
    flag = ', "full_precision_matrix_mult": true' if form.full_precision else ""
    text = f'{{"format": "{form.format}"{flag}}}'.encode()
    return made(f"{layer}.comfy_quant", torch.tensor(list(text), dtype=torch.uint8))


def shape_of(plan: Plan, ours: str) -> tuple[int, ...]:
    """The shape of our tensor `ours`."""
    module, _, name = ours.rpartition(".")
    owner = plan.model.get_submodule(module)
    tensor = owner.q if isinstance(owner, Fp8Linear) and name == "weight" else getattr(owner, name)
    return tuple(tensor.shape)


class _Whole:
    """One weight, bias or table of the new file, with all that hangs on it."""

    def __init__(self, file: TensorFile, name: str, shape: tuple[int, ...], cuts: Sequence[Cut], linear: bool) -> None:
        self.file, self.name, self.shape, self.cuts, self.linear = file, name, shape, cuts, linear
        self.layer = name.removesuffix(".weight")
        self.rules = [cut.slab.rule for cut in cuts if cut.slab.rule is not None]
        dtypes = {cut.slab.entry.dtype for cut in cuts}
        self.fp8 = dtypes <= FP8_DTYPES
        if len(dtypes) > 1 and (self.fp8 or dtypes & FP8_DTYPES):
            self._refuse_mixture(dtypes)
        self.dtypes = dtypes

    @property
    def scaled(self) -> bool:
        return any(rule.scale is not None for rule in self.rules)

    @property
    def form(self) -> LayerForm:
        scale, block = self.scaling
        return LayerForm(
            format=FORMAT_NAMES[self.cuts[0].slab.entry.dtype],
            granularity="block" if block else "row" if scale.ndim else "tensor",
            block=block,
            full_precision=any(rule.full_precision for rule in self.rules),
            low_rank=self.rank,
        )

    @cached_property
    def scaling(self) -> tuple[Tensor, Block | None]:
        """The scale, and what shares one where that is a block; see `stacking.stack_scales`."""
        return stack_scales([_scaled_rows(cut) for cut in self.cuts], self.shape[-1], self.name)

    @property
    def input_scale(self) -> Tensor | None:
        """[]; the largest where there are several: of pieces that share an input and were calibrated apart, or of parts
        of the schedule, which ComfyUI's form cannot tell apart. None unless all pieces have one."""
        scales = [rule.input_scale.amax() for rule in self.rules if rule.input_scale is not None]
        return torch.stack(scales).amax() if scales and len(scales) == len(self.cuts) else None

    @cached_property
    def rank(self) -> int:
        """Of the low-rank branch; 0 is none."""
        return len(self._branch()[0]) if any(rule.low_rank for rule in self.rules) else 0

    def targets(self, dtype: torch.dtype | None, *, described: bool, branch: bool) -> Iterator[Target]:
        yield self._values(dtype)
        if not self.scaled:
            return
        yield made(f"{self.layer}.weight_scale", self.scaling[0])
        if (input_scale := self.input_scale) is not None:
            yield made(f"{self.layer}.input_scale", input_scale)
        if described:
            yield comfy_quant(self.layer, self.form)
        if branch and self.rank:
            wanted = dtype or self._branch_dtype
            down, up = (self.rank, self.shape[1]), (self.shape[0], self.rank)
            yield Target(name=self.layer + DOWN, dtype=wanted, shape=down, make=lambda: self._branch()[0].to(wanted))
            yield Target(name=self.layer + UP, dtype=wanted, shape=up, make=lambda: self._branch()[1].to(wanted))

    def refuse_for_comfyui(self) -> None:
        """ComfyUI reads one scale a matrix, and no branch."""
        form = self.form
        if form.granularity != "tensor" or form.low_rank:
            what = "a low-rank branch" if form.low_rank else f"scales by {form.granularity}"
            raise RequestError(
                f"'{self.layer}' has {what}, which ComfyUI does not read. Write our own form instead ('octavo'), or "
                "quantize with one scale for each matrix."
            )

    def _values(self, dtype: torch.dtype | None) -> Target:
        kept = torch_dtype(self.cuts[0].slab.entry)
        wanted = kept if self.fp8 or dtype is None else dtype
        if dtype is None and len(self.dtypes) > 1:
            self._refuse_mixture(self.dtypes)
        if not any(cut.slab.transposed for cut in self.cuts):
            rows = tuple(
                Rows(self.file, cut.slab.entry.name, cut.slab.start + cut.start, cut.slab.start + cut.stop)
                for cut in self.cuts
            )
            return Target(name=self.name, dtype=wanted, shape=self.shape, rows=rows)
        (cut,) = self.cuts
        if self.fp8 and self.scaling[0].ndim:
            raise UnsupportedFormatError(
                f"'{self.file.path}' keeps '{cut.slab.entry.name}' as [in, out] with scales by row, which cannot be "
                "turned. Use a 16-bit version of the model."
            )
        turned = cut.slab.entry.name
        return Target(
            name=self.name,
            dtype=wanted,
            shape=self.shape,
            make=lambda: self.file.read(turned).t()[cut.start : cut.stop].contiguous().to(wanted),
        )

    @property
    def _branch_dtype(self) -> torch.dtype:
        return next(torch_dtype(rule.low_rank.down) for rule in self.rules if rule.low_rank is not None)

    def _branch(self) -> tuple[Tensor, Tensor]:
        """Down [r, K] and up [N, r]; read anew each time, since those of all layers together are not small."""
        return stack_branches(self.file, [cut.stretch for cut in self.cuts], self._branch_dtype)

    def _refuse_mixture(self, dtypes: set[str]) -> NoReturn:
        names = ", ".join(f"'{cut.slab.entry.name}' ({cut.slab.entry.dtype})" for cut in self.cuts)
        remedy = (
            "Quantize all of them, or none" if dtypes & FP8_DTYPES else "Say which dtype all shall have, with --dtype"
        )
        raise UnsupportedFormatError(
            f"'{self.file.path}' keeps pieces of what becomes one matrix, '{self.name}', in different dtypes: {names}. "
            f"{remedy}."
        )


def _named(
    plan: Plan, origin: Origin, style: Style, prefix: str
) -> Iterator[tuple[str, tuple[int, ...], list[Cut], bool]]:
    """Names in the new file of what our tensor becomes, with shape and rows of each."""
    kind, config = plan.located.part.kind, plan.config
    depth = config.depth if isinstance(config, MMDiTConfig) else 0
    levels = len(config.channels) if isinstance(config, VAEConfig) else 0
    pieces = pieces_in(kind, style, origin.ours, depth=depth, levels=levels)
    shape = shape_of(plan, origin.ours)
    rest = _rest_of_shape(kind, style, origin.ours, shape[1:])
    for name, stretches in _divided(pieces, shape[0]).items():
        cuts = [cut for start, stop in stretches for cut in _cuts(origin, start, stop)]
        rows = sum(cut.rows for cut in cuts)
        yield prefix + name, (rows, *rest), cuts, origin.module in plan.linears


def _rest_of_shape(kind: Kind, style: Style, ours: str, rest: tuple[int, ...]) -> tuple[int, ...]:
    """diffusers keeps the 1×1 convolutions of a VAE's attention as linears."""
    return rest[:1] if (kind, style) == ("vae", "diffusers") and ".attn_1." in ours else rest


def _divided(pieces: Sequence[Piece], rows: int) -> dict[str, list[tuple[int, int]]]:
    """By name, from where to where in our rows it reaches, in the order of its own rows."""
    assert rows % len(pieces) == 0, f"{rows} rows are not to be divided among {len(pieces)}"
    share = rows // len(pieces)
    places = [(piece, (i * share, (i + 1) * share)) for i, piece in enumerate(pieces)]
    divided: dict[str, list[tuple[int, int]]] = {}
    for piece, place in sorted(places, key=lambda pair: pair[0].half or 0):
        divided.setdefault(piece.name, []).append(place)
    return divided


def _cuts(origin: Origin, start: int, stop: int) -> Iterator[Cut]:
    """What of the file makes up our rows start to stop."""
    above = 0
    for slab in origin.slabs:
        first, last = max(start - above, 0), min(stop - above, slab.rows)
        if first < last:
            yield Cut(slab, first, last)
        above += slab.rows


def _scaled_rows(cut: Cut) -> ScaledRows:
    """Where a piece is cut out and all its rows have the same scale, that is its scale."""
    start, stop = cut.slab.start + cut.start, cut.slab.start + cut.stop
    rows = cut.slab.scaled_rows._replace(start=start, stop=stop, ends=stop == cut.slab.entry.shape[0])
    if rows.scale.ndim and rows.block is None and cut.rows < cut.slab.entry.shape[0]:
        mine = rows.scale[start:stop]
        if bool((mine == mine[0]).all()):
            return rows._replace(scale=mine[0, 0])
    return rows


def _fitting_form(whole: Sequence[_Whole], style: Style) -> Form:
    scaled = [each.form for each in whole if each.scaled]
    beyond_comfyui = any(form.granularity != "tensor" or form.low_rank for form in scaled)
    if style == "diffusers":
        # A scale by block needs its description: by its shape alone it could be one by row.
        needed = any(form.full_precision or form.low_rank or form.block for form in scaled)
        return "octavo" if needed else "bare"
    return "octavo" if beyond_comfyui else "comfyui"
