"""The FP8 form of our own files: what the header says of each quantized layer.

    octavo.quantization = {"version": 1, "layers": {
        "joint_blocks.0.x_block.mlp.fc1": {"format": "float8_e4m3fn", "granularity": "row", "low_rank": 16}}}

Layers go by their full names in the file, without `.weight`. Beside `X.weight` [N, K] in FP8 the file holds

- `X.weight_scale`, float32: [] by tensor, [N, 1] by row, [⌈N/n⌉, ⌈K/k⌉] by blocks of n rows and k columns;
- `X.input_scale`, float32 []: optional, calibrated; [k + 1] where the description has k `step_sigmas`, falling noise
  levels at which it changes;
- `X.low_rank_down` [r, K] and `X.low_rank_up` [N, r], 16-bit: optional; the layer adds x · downᵀ · upᵀ.

`full_precision` asks never to round the layer's input. Older files are read by `scales`, which reads this one too.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

from octavo.checkpoint.header import Entry
from octavo.checkpoint.tensors import TensorFile
from octavo.errors import CorruptFileError, UnsupportedFormatError
from octavo.fp8 import scale
from octavo.fp8.scale import BLOCK, Block, Granularity

KEY = "octavo.quantization"
RECIPE_KEY = "octavo.recipe"  # the recipe that made the file, TOML
CALIBRATION_KEY = "octavo.calibration"  # a hash of what it was calibrated on
VERSION_KEY = "octavo.version"  # of the library that wrote the file
VERSION = 1
FORMATS = ("float8_e4m3fn", "float8_e5m2")
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
DOWN, UP = ".low_rank_down", ".low_rank_up"
LOW_RANK_DTYPES = frozenset({"F16", "BF16", "F32"})
ADVICE = "Quantize the model again, or update Octavo."


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForm:
    """What a file says of one FP8 layer."""

    format: str  # as in JSON: float8_e4m3fn, float8_e5m2
    granularity: Granularity | None = None  # None where the form leaves it to the scale's shape
    block: Block | None = None  # what shares a scale, where granularity is block
    full_precision: bool = False
    low_rank: int = 0  # rank of the branch; 0 is none
    step_sigmas: tuple[float, ...] = ()  # falling levels at which the input's scale changes

    def as_json(self) -> dict[str, object]:
        """The layer's entry under `octavo.quantization`."""
        fields: dict[str, object] = {"format": self.format, "granularity": self.granularity}
        if self.block is not None:
            fields["block"] = list(self.block)
        if self.full_precision:
            fields["full_precision"] = True
        if self.low_rank:
            fields["low_rank"] = self.low_rank
        if self.step_sigmas:
            fields["step_sigmas"] = list(self.step_sigmas)
        return fields


@dataclass(frozen=True, slots=True)
class LowRank:
    """The low-rank branch of one layer in a file."""

    down: Entry  # [r, K]
    up: Entry  # [N, r]

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def dumps(layers: Mapping[str, LayerForm]) -> str:
    """What goes into the header under `KEY`; layers by their full names in the file, without `.weight`."""
    fields = {name: form.as_json() for name, form in sorted(layers.items())}
    return json.dumps({"version": VERSION, "layers": fields}, separators=(",", ":"))


def read_forms(file: TensorFile) -> dict[str, LayerForm]:
    """The layers that the headers of `file` describe, by their full names; none in files of other makers.

    Raises:
        CorruptFileError: a description makes no sense, or is of a layer that the file does not hold.
        UnsupportedFormatError: it is of a newer version, or has a format or granularity that is not known.
    """
    forms: dict[str, LayerForm] = {}
    for header in file.headers:
        text = header.metadata.get(KEY)
        if text is None:
            continue
        where = f"'{header.path}': {KEY}"
        for name, fields in _layers(text, where).items():
            if f"{name}.weight" not in file.entries:
                raise CorruptFileError(f"{where} describes the layer '{name}', which the file does not hold. {ADVICE}")
            forms[name] = _form(fields, f"{where}: '{name}'")
    return forms


def low_rank(file: TensorFile, layer: str, form: LayerForm) -> LowRank | None:
    """Where the branch of `layer` lies; None where it has none.

    Raises:
        CorruptFileError: it is described but absent, or its shapes do not fit the layer and the described rank.
    """
    if not form.low_rank:
        return None
    weight = file.entries[f"{layer}.weight"]
    rows, columns = weight.shape
    found = []
    for ending, shape in ((DOWN, (form.low_rank, columns)), (UP, (rows, form.low_rank))):
        entry = file.entries.get(layer + ending)
        if entry is None:
            raise CorruptFileError(
                f"'{weight.file}' describes a low-rank branch of '{layer}' but lacks '{layer}{ending}'. {ADVICE}"
            )
        if entry.shape != shape or entry.dtype not in LOW_RANK_DTYPES:
            raise CorruptFileError(
                f"'{entry.file}' has '{entry.name}' as {entry.dtype} of shape {list(entry.shape)}; a branch of rank "
                f"{form.low_rank} at a layer of shape {[rows, columns]} needs {list(shape)} in 16 or 32 bits. {ADVICE}"
            )
        found.append(entry)
    return LowRank(*found)


def scale_shape(form: LayerForm, weight: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scale of a weight [N, K] in this form."""
    rows, columns = weight
    return scale.scale_shape(rows, columns, form.granularity or "tensor", form.block or BLOCK)


def summary(forms: Mapping[str, LayerForm]) -> str:
    """How these layers are kept, in words: `e4m3fn by row, low-rank 16`."""
    formats = sorted({form.format.removeprefix("float8_") for form in forms.values()})
    granularities = sorted({form.granularity or "tensor" for form in forms.values()})
    ranks = sorted({form.low_rank for form in forms.values() if form.low_rank})
    branch = f", low-rank {' and '.join(map(str, ranks))}" if ranks else ""
    return f"{' and '.join(formats)} by {' and '.join(granularities)}{branch}"


def recipe_name(metadata: Mapping[str, str]) -> str | None:
    """What the recipe that made a file is called, or None where it has none or does not say."""
    try:
        name = tomllib.loads(metadata.get(RECIPE_KEY, "")).get("name")
    except tomllib.TOMLDecodeError:  # only words for people hang on it
        return None
    return name if isinstance(name, str) else None


def _layers(text: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where} is not JSON ({error}). {ADVICE}") from error
    if not isinstance(fields, dict):
        raise CorruptFileError(f"{where} is not a JSON object. {ADVICE}")
    if fields.get("version") != VERSION:
        raise UnsupportedFormatError(
            f"{where} is of version {fields.get('version')!r:.60}; this Octavo reads version {VERSION}. {ADVICE}"
        )
    layers = fields.get("layers")
    if not isinstance(layers, dict):
        raise CorruptFileError(f"{where} has no object of layers. {ADVICE}")
    return layers


def _form(fields: object, where: str) -> LayerForm:
    if not isinstance(fields, dict):
        _refuse(where, fields, "a layer", "an object")
    fmt, granularity = fields.get("format"), fields.get("granularity")
    block, full_precision, rank = fields.get("block"), fields.get("full_precision", False), fields.get("low_rank", 0)
    steps = fields.get("step_sigmas", [])
    if fmt not in FORMATS:
        raise UnsupportedFormatError(f"{where} has the format {fmt!r:.60}; known are {', '.join(FORMATS)}. {ADVICE}")
    if granularity not in GRANULARITIES:
        raise UnsupportedFormatError(
            f"{where} has the granularity {granularity!r:.60}; known are {', '.join(GRANULARITIES)}. {ADVICE}"
        )
    if granularity == "block":
        if not (isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)):
            _refuse(where, block, "block", "two whole numbers from 1 up")
    elif block is not None:
        _refuse(where, block, "block", f"none, its granularity being '{granularity}'")
    if type(full_precision) is not bool:
        _refuse(where, full_precision, "full_precision", "true or false")
    if type(rank) is not int or rank < 0:
        _refuse(where, rank, "low_rank", "a whole number from 0 up")
    if not (isinstance(steps, list) and all(type(sigma) in (int, float) for sigma in steps)):
        _refuse(where, steps, "step_sigmas", "a list of numbers")
    return LayerForm(
        format=fmt,
        granularity=granularity,
        block=None if block is None else (block[0], block[1]),
        full_precision=full_precision,
        low_rank=rank,
        step_sigmas=tuple(float(sigma) for sigma in steps),
    )


def _refuse(where: str, value: object, field: str, expected: str) -> NoReturn:
    raise CorruptFileError(f"{where} has {field} = {value!r:.60}; expected {expected}. {ADVICE}")
