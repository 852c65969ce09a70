"""How the FP8 tensors of a file are to be read: every form in use, and a stop where none fits.

Forms, all with value = code · scale:

- plain: no scales; the codes are the values.
- `scaled_fp8`, ComfyUI's older form: a marker tensor of that name, per layer `.scale_weight` and perhaps
  `.scale_input`. A marker of two elements asks for multiplication in full precision. An input scale of 1 means none.
- `comfy_quant`, ComfyUI's present form: per layer JSON in a tensor of bytes, `.weight_scale`, perhaps `.input_scale`.
- header: the same JSON for all layers in the header's `_quantization_metadata`. Layer names may carry a prefix that
  the file's own do not, or lack it; a string may stand for a layer's description, as in ComfyUI's documentation.
- `octavo.quantization` in the header, our own: see `octavo_form`.
- `weight_scale` alone, as NVIDIA's ModelOpt exports it.

A scale is one number, or one for each row (output channel); our own form also has them by block. Only matrices have
scales; biases, norms and embeddings in FP8 hold plain values.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoint import octavo_form
from octavo.checkpoint.header import Entry
from octavo.checkpoint.kinds import CLIP_PREFIXES, MMDIT_PREFIXES, T5_PREFIXES, VAE_PREFIXES, Part
from octavo.checkpoint.octavo_form import LayerForm, LowRank
from octavo.checkpoint.tensors import TensorFile
from octavo.errors import CorruptFileError, UnsupportedFormatError
from octavo.fp8.formats import E4M3FN, E5M2
from octavo.fp8.scale import Block

METADATA_KEY = "_quantization_metadata"
FP8_FORMATS: Mapping[str, str] = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}  # name in JSON: dtype in file
FP8_DTYPES = frozenset(FP8_FORMATS.values())
MARKER_DTYPES = frozenset({*FP8_DTYPES, "F32"})  # of `scaled_fp8`; F32 means e4m3fn
WEIGHT_SCALES = (".weight_scale", ".scale_weight")
INPUT_SCALES = (".input_scale", ".scale_input")
PREFIXES = tuple(sorted({*MMDIT_PREFIXES, *CLIP_PREFIXES, *T5_PREFIXES, *VAE_PREFIXES} - {""}, key=len, reverse=True))


@dataclass(frozen=True, slots=True)
class WeightRule:
    """How to read one FP8 weight."""

    scale: Tensor | None  # [] or [rows, 1], or by block, float32 on the CPU; None: the codes are the values
    input_scale: Tensor | None = None  # [] float32 on the CPU; [G] where it changes over the schedule
    step_sigmas: tuple[float, ...] = ()  # falling levels at which it does
    full_precision: bool = False  # the file asks not to multiply in FP8
    low_rank: LowRank | None = None  # a branch to be added to the layer's output
    block: Block | None = None  # what shares a scale, where scales are by block


class ScaleRules:
    """The FP8 rules of one part of a file.

    Attributes:
        form: the form in words, or None where no tensor is FP8.
        auxiliary: names of scales, markers and descriptions, which are not weights.
    """

    def __init__(self, file: TensorFile, part: Part) -> None:
        self._file = file
        self._entries = {name: file.entries[name] for name in part.names}
        self._own = {
            name: form for name, form in octavo_form.read_forms(file).items() if f"{name}.weight" in self._entries
        }
        self._layers = {**_header_layers(file, part), **self._described_layers()}
        self._check_own()
        self._layers |= self._own
        self._marker = self._find_marker()
        self.auxiliary = frozenset(name for name in part.names if _is_auxiliary(name) or self._is_branch(name))
        self._scaled = bool(self._layers or self._marker) or any(map(_is_weight_scale, self.auxiliary))
        self._refuse_scales_without_codes()
        self.form = self._form()

    def rule(self, weight: str, *, linear: bool) -> WeightRule:
        """How to read the FP8 tensor `weight`.

        Args:
            weight: its name in the file.
            linear: whether it is the matrix of a linear layer, which must have a scale if any layer has one.

        Raises:
            CorruptFileError: it should have a scale and has none, or one that is no number or of another shape than
                described; two descriptions disagree; a low-rank branch that does not fit.
            UnsupportedFormatError: scales by block outside of our own form.
        """
        entry = self._entries[weight]
        layer_name = weight.removesuffix(".weight")
        layer = self._layers.get(layer_name)
        if layer is not None:
            _check_format(entry, layer)
        own = self._own.get(layer_name)
        if own is not None:
            return self._own_rule(entry, layer_name, own)
        scale = self._scale(layer_name, WEIGHT_SCALES, rows=entry.shape[0] if len(entry.shape) == 2 else 1)
        if scale is None and self._scaled and (linear or layer is not None):
            raise CorruptFileError(
                f"'{entry.file}' keeps '{weight}' in FP8 without the scale '{layer_name}{WEIGHT_SCALES[0]}' that it "
                "needs; other layers have theirs. Without it the picture would be garbage. Make the file again."
            )
        input_scale = self._scale(layer_name, INPUT_SCALES, rows=1)
        if input_scale is not None and self._marker is not None and input_scale == 1:
            input_scale = None
        full_precision = (self._marker is not None and self._marker.shape == (2,)) or (
            layer is not None and layer.full_precision
        )
        return WeightRule(scale, input_scale, full_precision=full_precision)

    def _own_rule(self, weight: Entry, layer: str, form: LayerForm) -> WeightRule:
        """The rule of a layer that is described in our own form, which leaves nothing to guess."""
        if len(weight.shape) != 2:
            raise CorruptFileError(
                f"'{weight.file}' describes '{layer}' as a quantized layer, but '{weight.name}' has the shape "
                f"{list(weight.shape)}; expected a matrix. {octavo_form.ADVICE}"
            )
        name, shape = layer + WEIGHT_SCALES[0], octavo_form.scale_shape(form, weight.shape)
        entry = self._entries.get(name)
        if entry is None or entry.dtype != "F32" or entry.shape != shape:
            held = "no such tensor" if entry is None else f"{entry.dtype} of shape {list(entry.shape)}"
            raise CorruptFileError(
                f"'{weight.file}' describes '{layer}' as scaled by {form.granularity}, for which it needs '{name}' as "
                f"F32 of shape {list(shape)}, and holds {held}. {octavo_form.ADVICE}"
            )
        return WeightRule(
            self._read_scale(entry),
            self._input_scales(layer, form) if form.step_sigmas else self._scale(layer, INPUT_SCALES, rows=1),
            form.step_sigmas,
            form.full_precision,
            octavo_form.low_rank(self._file, layer, form),
            form.block,
        )

    def _input_scales(self, layer: str, form: LayerForm) -> Tensor:
        """[G], one for each part of the schedule."""
        name, count = layer + INPUT_SCALES[0], len(form.step_sigmas) + 1
        entry = self._entries.get(name)
        if entry is None or entry.shape != (count,):
            held = "no such tensor" if entry is None else f"one of shape {list(entry.shape)}"
            raise CorruptFileError(
                f"'{self._file.path}' describes '{layer}' with {count} input scales over the schedule, for which it "
                f"needs '{name}' of shape [{count}], and holds {held}. {octavo_form.ADVICE}"
            )
        return self._read_scale(entry)

    def _scale(self, layer: str, endings: tuple[str, ...], rows: int) -> Tensor | None:
        name = next((layer + ending for ending in endings if layer + ending in self._entries), None)
        if name is None:
            return None
        entry = self._entries[name]
        if entry.dtype not in ("F32", "F16", "BF16", "F64") or entry.shape not in (
            (),
            (1,),
            (1, 1),
            (rows,),
            (rows, 1),
        ):
            raise UnsupportedFormatError(
                f"'{entry.file}' has the scale '{name}' as {entry.dtype} of shape {list(entry.shape)}; Octavo reads "
                f"one number for the tensor or one for each of its {rows} rows. Use a file with such scales."
            )
        scale = self._read_scale(entry)
        return scale.reshape(()) if scale.numel() == 1 else scale.reshape(rows, 1)

    def _read_scale(self, entry: Entry) -> Tensor:
        scale = self._file.read(entry.name, torch.float32)
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise CorruptFileError(f"'{entry.file}' has a scale in '{entry.name}' that is no finite number from 0 up.")
        return scale

    def _is_branch(self, name: str) -> bool:
        """Whether `name` is half of a low-rank branch that the header describes."""
        layer, _, ending = name.rpartition(".")
        form = self._own.get(layer)
        return form is not None and form.low_rank > 0 and f".{ending}" in (octavo_form.DOWN, octavo_form.UP)

    def _check_own(self) -> None:
        for name, form in self._own.items():
            _check_format(self._entries[f"{name}.weight"], form)
        twice = sorted(self._own.keys() & self._layers.keys())
        if twice:
            raise CorruptFileError(
                f"'{self._file.path}' describes '{twice[0]}' both as ComfyUI and as Octavo do. {octavo_form.ADVICE}"
            )

    def _described_layers(self) -> dict[str, LayerForm]:
        layers = {}
        for name, entry in self._entries.items():
            if name.endswith(".comfy_quant"):
                if entry.dtype != "U8":
                    raise CorruptFileError(f"'{entry.file}' has '{name}' as {entry.dtype}, not as bytes of JSON.")
                text = bytes(self._file.read(name).flatten().tolist())
                layer = name.removesuffix(".comfy_quant")
                layers[layer] = _layer(self._file, layer, _json(text, f"'{entry.file}': '{name}'"))
        return layers

    def _find_marker(self) -> Entry | None:
        for name, entry in self._entries.items():
            if name.rpartition(".")[2] == "scaled_fp8":
                if entry.dtype not in MARKER_DTYPES:
                    raise UnsupportedFormatError(
                        f"'{entry.file}' has the marker '{name}' of dtype {entry.dtype}, which names no FP8 format; "
                        f"known are {', '.join(sorted(MARKER_DTYPES))}. Use another FP8 version of the model."
                    )
                return entry
        return None

    def _refuse_scales_without_codes(self) -> None:
        for name in self.auxiliary:
            ending = next((ending for ending in WEIGHT_SCALES if name.endswith(ending)), None)
            weight = self._entries.get(name.removesuffix(ending) + ".weight") if ending else None
            if weight is not None and weight.dtype not in FP8_DTYPES:
                raise UnsupportedFormatError(
                    f"'{weight.file}' keeps '{weight.name}' as {weight.dtype} with a scale, which is none of the forms "
                    "that Octavo reads. Use an FP8 or 16-bit version of the model."
                )

    def _form(self) -> str | None:
        dtypes = {entry.dtype for name, entry in self._entries.items() if name not in self.auxiliary}
        if self._own:
            recipe = octavo_form.recipe_name(self._file.metadata)
            return f"octavo form: {octavo_form.summary(self._own)}" + (f", recipe {recipe}" if recipe else "")
        used = [fmt.name for fmt, dtype in ((E4M3FN, "F8_E4M3"), (E5M2, "F8_E5M2")) if dtype in dtypes]
        if not used:
            return None
        if any(name.endswith(".comfy_quant") for name in self.auxiliary):
            how = "scaled, described by layer (comfy_quant)"
        elif self._layers:
            how = "scaled, described in the header"
        elif self._marker is not None:
            how = "scaled, older form (scaled_fp8)"
        else:
            how = "scaled (weight_scale)" if self._scaled else "plain, no scales"
        return f"{' and '.join(used)}, {how}"


def _check_format(weight: Entry, layer: LayerForm) -> None:
    if FP8_FORMATS[layer.format] != weight.dtype:
        raise CorruptFileError(
            f"'{weight.file}' describes '{weight.name.removesuffix('.weight')}' as {layer.format} but keeps it as "
            f"{weight.dtype}. Make the file again."
        )


def _is_auxiliary(name: str) -> bool:
    return name.endswith((*WEIGHT_SCALES, *INPUT_SCALES, ".comfy_quant")) or name.rpartition(".")[2] == "scaled_fp8"


def _is_weight_scale(name: str) -> bool:
    return name.endswith(WEIGHT_SCALES)


def _header_layers(file: TensorFile, part: Part) -> dict[str, LayerForm]:
    """Layers of `part` that the headers describe, by their name in the file."""
    described: dict[str, Any] = {}
    for header in file.headers:
        if METADATA_KEY in header.metadata:
            where = f"'{header.path}': {METADATA_KEY}"
            fields = _json(header.metadata[METADATA_KEY], where)
            layers = fields.get("layers", {}) if isinstance(fields, dict) else None
            if not isinstance(layers, dict):
                raise CorruptFileError(f"{where} is not an object with an object of layers. Make the file again.")
            described.update(layers)
    if not described:
        return {}
    # A name that is there to the letter wins over one that fits only without its prefix.
    bare = {_without_prefix(name): value for name, value in described.items()}
    found = {}
    for name in part.names:
        layer = name.removesuffix(".weight")
        if layer == name:
            continue
        value = described.get(layer, bare.get(_without_prefix(layer)))
        if value is not None:
            found[layer] = _layer(file, layer, value)
    return found


def _layer(file: TensorFile, name: str, description: object) -> LayerForm:
    """One layer's description, an object or just the format's name."""
    fields = {"format": description} if isinstance(description, str) else description
    if not isinstance(fields, dict) or not isinstance(fields.get("format"), str):
        raise CorruptFileError(f"'{file.path}' describes '{name}' without a number format. Make the file again.")
    if fields["format"] not in FP8_FORMATS:
        raise UnsupportedFormatError(
            f"'{file.path}' keeps '{name}' as {fields['format']}, which Octavo does not read; it reads "
            f"{' and '.join(FP8_FORMATS)}. Use an FP8 or 16-bit version of the model."
        )
    return LayerForm(format=fields["format"], full_precision=fields.get("full_precision_matrix_mult") is True)


def _json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where} is not JSON ({error}). Make the file again.") from error


def _without_prefix(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)
