"""A quantized checkpoint on its way to a file: planned before a weight is read, written layer by layer.

    plan = plan_part(source.require("mmdit"))
    output = plan_output(plan, {"joint_blocks.0.x_block.mlp.fc1": LayerOutput(spec=LinearSpec(granularity="row"))})
    with ResumableWriter(path, output.layout, output.metadata) as writer:
        output.copy(writer)                             # all that is not quantized, byte for byte
        for name in output.missing(writer):
            output.write(writer, name, quantized_layer)

Two forms: `octavo` says everything (see `octavo_form`), `comfyui` is what ComfyUI reads too: one scale a matrix, no
low-rank branch. What a layer becomes is decided by `quantize`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo._version import __version__
from octavo.checkpoint import octavo_form
from octavo.checkpoint.detect import unsaid
from octavo.checkpoint.kinds import CONFIG_KEY
from octavo.checkpoint.layout import pieces_in
from octavo.checkpoint.octavo_form import DOWN, UP, LayerForm
from octavo.checkpoint.plan import Origin, Plan
from octavo.checkpoint.resume import ResumableWriter
from octavo.checkpoint.rewrite import Target, as_it_is, copy, layout_of
from octavo.checkpoint.save import Layout, Writer
from octavo.checkpoint.scales import FP8_DTYPES
from octavo.checkpoint.tensors import torch_dtype
from octavo.checkpoint.translate import comfy_quant, translate
from octavo.errors import RequestError
from octavo.fp8 import LinearSpec
from octavo.quantize.layer import QuantizedLayer

OutputForm = Literal["octavo", "comfyui"]
MMDIT_PREFIX = "model.diffusion_model."  # of a diffusion model whose source has names of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOutput:
    """What a layer will be, as far as the file's layout depends on it."""

    spec: LinearSpec
    low_rank: int = 0  # rank of the branch; 0 is none


@dataclass(frozen=True, slots=True)
class Output:
    """A quantized file, planned.

    Attributes:
        layout: of all tensors.
        metadata: of the header.
        copies: the tensors that are not quantized.
        layers: our names of the quantized layers, in the order of the source file, and their tensors in the new one.
    """

    layout: Layout
    metadata: Mapping[str, str]
    copies: tuple[Target, ...]
    layers: Mapping[str, tuple[str, ...]]
    _places: Mapping[str, tuple[str, ...]]  # of each layer's rows, in the file
    _form: OutputForm
    _forms: Mapping[str, LayerForm]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(Target(name=name, dtype=dtype, shape=shape).nbytes for name, (dtype, shape) in self.layout.items())

    def copy(self, writer: Writer, progress: Callable[[int], object] = lambda _: None) -> None:
        """Write what is not quantized; what a resumed `writer` has already is left out.

        Args:
            writer: made with `layout` and `metadata`.
            progress: told the bytes of every few megabytes written.

        Raises:
            CheckpointError: a weight is NaN or infinite; a file cannot be read or written.
        """
        done = _done(writer)
        copy([target for target in self.copies if target.name not in done], writer, progress)

    def missing(self, writer: Writer) -> list[str]:
        """Our names of the layers that are not, or not wholly, in the part of a resumed `writer`."""
        done = _done(writer)
        return [name for name, tensors in self.layers.items() if not done.issuperset(tensors)]

    def tensors(self, name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
        """The tensors of the layer called `name` by us, under their names in the file."""
        form, places = self._forms[name], self._places[name]
        tensors: dict[str, Tensor] = {}
        for full, share in zip(places, _shares(layer.weight.q.shape[0], len(places)), strict=True):
            tensors[f"{full}.weight"] = layer.weight.q[share]
            tensors[f"{full}.weight_scale"] = _share_of_scale(layer.weight.scale.float(), form, share)
            if layer.input_scale is not None:
                tensors[f"{full}.input_scale"] = layer.input_scale.float()
            if layer.bias is not None:
                tensors[f"{full}.bias"] = layer.bias[share].to(self.layout[f"{full}.bias"][0])
            if layer.low_rank is not None:
                down, up = layer.low_rank
                for ending, half in ((DOWN, down), (UP, up[share])):
                    tensors[full + ending] = half.to(self.layout[full + ending][0])
            if self._form == "comfyui":
                described = comfy_quant(full, form)
                assert described.make is not None
                tensors[described.name] = described.make()
        assert layer.full_precision == form.full_precision, f"'{name}' was announced with another full_precision"
        assert set(tensors) == set(self.layers[name]), f"'{name}' differs from what was announced"
        return tensors

    def write(self, writer: Writer, name: str, layer: QuantizedLayer) -> None:
        """Put the layer called `name` by us into the file, where a resumed `writer` has not got it."""
        done = _done(writer)
        for full, tensor in self.tensors(name, layer).items():
            if full not in done:
                writer.write(full, tensor)


def plan_output(
    plan: Plan,
    layers: Mapping[str, LayerOutput],
    form: OutputForm = "octavo",
    metadata: Mapping[str, str] | None = None,
) -> Output:
    """Lay out the file in which `layers` of a part are quantized and all else is as it was.

    Args:
        plan: of the part, 16-bit. Other parts of the same file are copied; of diffusers folders and shards only
            this part goes into the new file, by single-file names.
        layers: by our names without `.weight`, such as `joint_blocks.0.x_block.mlp.fc1`.
        form: of the file.
        metadata: more for the header, such as the recipe; laid over the source's.

    Raises:
        RequestError: the part is quantized already, or `form` cannot say what a layer needs.
    """
    located = plan.located
    file, part = located.file, located.part
    _refuse_quantized(plan)
    # Of ControlNets both styles are single files; each stays what it is.
    style = part.style if part.kind == "controlnet" else "single-file"
    prefix = part.prefix if part.style == style else MMDIT_PREFIX if part.kind == "mmdit" else ""
    single = len(file.headers) == 1 and part.style == style
    origins = {origin.ours: origin for origin in plan.origins}
    forms = {name: _form(output) for name, output in layers.items()}

    quantized: dict[str, Layout] = {}
    places: dict[str, tuple[str, ...]] = {}
    for name in sorted(layers, key=lambda name: list(origins).index(f"{name}.weight")):
        if form == "comfyui":
            _refuse_for_comfyui(name, layers[name])
        pieces = pieces_in(part.kind, style, f"{name}.weight")
        places[name] = tuple(prefix + piece.name.removesuffix(".weight") for piece in pieces)
        quantized[name] = _layout(places[name], name, layers[name], origins, form, forms[name])
    taken = [ours for name in layers for ours in (f"{name}.weight", f"{name}.bias") if ours in origins]
    copies = list(translate(plan, style, prefix, without=taken).targets)
    if single:
        used = {slab.entry.name for origin in plan.origins for slab in origin.slabs}
        copies += [as_it_is(file, name) for name in file.entries if name not in used]

    own = octavo_form.dumps({place: forms[name] for name in places for place in places[name]})
    beyond_shapes = unsaid(part.kind, plan.config) if part.kind == "controlnet" else {}
    header = {
        "format": "pt",
        **file.metadata,
        **({CONFIG_KEY: json.dumps(beyond_shapes)} if beyond_shapes else {}),
        octavo_form.VERSION_KEY: __version__,
        **({octavo_form.KEY: own} if form == "octavo" else {}),
        **(metadata or {}),
    }
    layout = dict(layout_of(copies))
    for tensors in quantized.values():
        layout |= tensors
    names = {name: tuple(tensors) for name, tensors in quantized.items()}
    return Output(layout, header, tuple(copies), names, places, form, forms)


def _layout(
    places: Sequence[str],
    name: str,
    output: LayerOutput,
    origins: Mapping[str, Origin],
    form: OutputForm,
    described: LayerForm,
) -> Layout:
    """Dtypes and shapes of one layer's tensors by their names in the file."""
    weight = origins[f"{name}.weight"]
    rows = sum(slab.rows for slab in weight.slabs) // len(places)
    if described.block and rows % described.block[0] and len(places) > 1:
        raise RequestError(
            f"The file keeps '{name}' in {len(places)} pieces of {rows} rows, which blocks of {described.block[0]} "
            "rows do not divide. Use a recipe with scales by row or by tensor."
        )
    columns = weight.slabs[0].entry.shape[0 if weight.slabs[0].transposed else 1]
    sixteen = torch_dtype(weight.slabs[0].entry)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for full in places:
        layout[f"{full}.weight"] = (output.spec.format.dtype, (rows, columns))
        layout[f"{full}.weight_scale"] = (torch.float32, octavo_form.scale_shape(described, (rows, columns)))
        if output.spec.input_scale:
            count = (len(described.step_sigmas) + 1,) if described.step_sigmas else ()
            layout[f"{full}.input_scale"] = (torch.float32, count)
        if f"{name}.bias" in origins:
            layout[f"{full}.bias"] = (torch_dtype(origins[f"{name}.bias"].slabs[0].entry), (rows,))
        if output.low_rank:
            layout[full + DOWN] = (sixteen, (output.low_rank, columns))
            layout[full + UP] = (sixteen, (rows, output.low_rank))
        if form == "comfyui":
            described_by = comfy_quant(full, described)
            layout[described_by.name] = (described_by.dtype, described_by.shape)
    return layout


def _shares(rows: int, count: int) -> list[slice]:
    """Where each of `count` equal pieces of so many rows lies."""
    return [slice(i * rows // count, (i + 1) * rows // count) for i in range(count)]


def _share_of_scale(scale: Tensor, form: LayerForm, share: slice) -> Tensor:
    """The scale of some rows of a matrix; where blocks share one, the rows are whole blocks."""
    if not scale.ndim:
        return scale
    height = form.block[0] if form.block else 1
    return scale[share.start // height : -(-share.stop // height)]


def _form(output: LayerOutput) -> LayerForm:
    spec = output.spec
    return LayerForm(
        format=f"float8_{spec.format.name}",
        granularity=spec.granularity,
        block=spec.block if spec.granularity == "block" else None,
        full_precision=spec.full_precision,
        low_rank=output.low_rank,
        step_sigmas=spec.step_sigmas,
    )


def _refuse_quantized(plan: Plan) -> None:
    fp8 = [slab.entry.name for origin in plan.origins for slab in origin.slabs if slab.entry.dtype in FP8_DTYPES]
    if fp8:
        raise RequestError(
            f"'{plan.located.file.path}' is FP8 already ({plan.fp8_form}): '{fp8[0]}' and {len(fp8) - 1} more. "
            "What rounding took cannot be brought back; quantize from the 16-bit version of the model."
        )


def _refuse_for_comfyui(name: str, output: LayerOutput) -> None:
    if output.spec.granularity != "tensor" or output.low_rank or output.spec.step_sigmas:
        what = "input scales by parts of the schedule" if output.spec.step_sigmas else "a low-rank branch"
        if output.spec.granularity != "tensor":
            what = f"scales by {output.spec.granularity}"
        raise RequestError(
            f"The recipe gives '{name}' {what}, which ComfyUI does not read. Write --format octavo, or use a recipe "
            "with one scale for each matrix, such as 'comfy'."
        )


def _done(writer: Writer) -> frozenset[str]:
    return writer.done if isinstance(writer, ResumableWriter) else frozenset()
