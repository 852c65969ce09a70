"""LoRA files of every maker → adapters by our names.

A file names each layer in one of many ways, and says what changes by tensors whose names end in one of a few: both are
tables here. What a file holds must all have a place in the model, or it is refused with the names that have none: half
a LoRA makes a wrong picture that nobody can explain.

Read are LoRA, LoCon on linear layers, LoHa, LoKr, full differences, and DoRA on top of these; by diffusers/PEFT,
kohya's sd-scripts, OneTrainer, LyCORIS and ComfyUI.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from octavo.checkpoint.kinds import Kind, what_else
from octavo.checkpoint.layout import pieces_in
from octavo.checkpoint.tensors import TensorFile, open_tensors
from octavo.errors import CorruptFileError, UnsupportedFormatError, WrongModelError
from octavo.models import MMDiT
from octavo.models.adapter import Adapter, Delta, Dense, Kronecker, LayerChange, LowRank, Rows

logger = logging.getLogger(__name__)

# What comes before a layer's name, by the model that it is in.
PREFIXES: Mapping[Kind, tuple[str, ...]] = {
    "mmdit": (
        "diffusion_model.", "model.diffusion_model.", "transformer.", "unet.", "base_model.model.", "lora_unet_",
        "lora_transformer_", "lycoris_", "",
    ),
    "clip_l": (
        "text_encoder.", "clip_l.transformer.", "text_encoders.clip_l.transformer.", "lora_te1_", "lora_te_",
        "lora_clip_l_", "clip_l.",
    ),
    "clip_g": (
        "text_encoder_2.", "clip_g.transformer.", "text_encoders.clip_g.transformer.", "lora_te2_", "lora_clip_g_",
        "clip_g.",
    ),
    "t5": (
        "text_encoder_3.", "t5xxl.transformer.", "text_encoders.t5xxl.transformer.", "lora_te3_", "lora_t5xxl_",
        "t5xxl.",
    ),
}  # fmt: skip

# Endings, spelled as in the first column of each maker; the value is what the rest of this file calls it.
ENDINGS: Mapping[str, str] = {
    "lora_A.weight": "down", "lora_down.weight": "down", "lora.down.weight": "down", "lora_A.default.weight": "down",
    "lora_B.weight": "up", "lora_up.weight": "up", "lora.up.weight": "up", "lora_B.default.weight": "up",
    "alpha": "alpha", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "lora_magnitude_vector.default.weight": "magnitude",
    "hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b",
    "lokr_w1": "w1", "lokr_w1_a": "w1_a", "lokr_w1_b": "w1_b", "lokr_w2": "w2", "lokr_w2_a": "w2_a",
    "lokr_w2_b": "w2_b",
    "diff": "diff",
}  # fmt: skip
_ENDING = re.compile(
    r"^(.+?)(?:\.|_(?=lora\.))("
    + "|".join(re.escape(ending) for ending in sorted(ENDINGS, key=len, reverse=True))
    + ")$"
)
_OF_A_UNET = re.compile(r"(^|[._])(input|output|middle|down|up|mid)_blocks?[._]")
SHOWN = 5  # names in a message about many
ADVICE = "Use a LoRA made for this model."


@dataclass(frozen=True, slots=True)
class Target:
    """Where a matrix of the file acts."""

    kind: Kind
    layer: str  # our name
    rows: tuple[tuple[int, int, int], ...] | None  # from row, to row, how many; None: it is the whole layer
    shape: tuple[int, int]  # N, K of the whole layer


def read_lora(path: Path, models: Mapping[Kind, nn.Module]) -> dict[Kind, Adapter]:
    """The adapters in a file.

    Args:
        path: of a safetensors file.
        models: that it may change; on the meta device is enough.

    Returns:
        An adapter for each model that it does change.

    Raises:
        CorruptFileError: NaN, halves without their other half, or shapes that do not fit together.
        WrongModelError: it is no LoRA, or of another model.
        UnsupportedFormatError: it changes what no adapter can, such as a convolution.
    """
    with open_tensors(path) as file:
        grouped, strange = grouped_names(file)
        if not grouped:
            what = what_else(file.entries) or "no LoRA that Octavo knows"
            raise WrongModelError(
                f"'{path}' is {what}: none of its {len(file.entries)} tensors is named like a LoRA's."
            )
        targets = _targets(models)
        absent = {name for name in grouped if spelled(name) not in targets and _of_absent(name, models)}
        if absent:
            logger.warning("'%s' changes text encoders that are not there; without them it acts less.", path.name)
        unknown = sorted({*strange, *(name for name in grouped.keys() - absent if spelled(name) not in targets)})
        if unknown:
            _refuse(path, file, len(grouped), unknown)
        layers: dict[Kind, dict[str, list[tuple[Target, Delta, Tensor | None]]]] = {}
        for name, parts in grouped.items():
            for target in targets.get(spelled(name), ()):
                delta, magnitude = _delta(file, name, parts, target)
                of_kind = layers.setdefault(target.kind, {})
                of_kind.setdefault(target.layer, []).append((target, delta, magnitude))
    return {
        kind: Adapter(path.stem, {layer: _change(path, layer, several) for layer, several in of_kind.items()})
        for kind, of_kind in layers.items()
    }


def grouped_names(file: TensorFile) -> tuple[dict[str, dict[str, str]], list[str]]:
    """By the file's name of a layer, the names of its tensors by what they are; and names that are like no LoRA's."""
    grouped: dict[str, dict[str, str]] = {}
    strange = []
    for name in file.entries:
        match = _ENDING.match(name)
        if match is None:
            strange.append(name)
        else:
            grouped.setdefault(match[1], {})[ENDINGS[match[2]]] = name
    return grouped, strange


def spelled(name: str) -> str:
    """One spelling of all: kohya writes underscores where others write dots."""
    return name.replace(".", "_")


def _of_absent(name: str, models: Mapping[Kind, nn.Module]) -> bool:
    """Whether a name is of a text encoder that is not among the models."""
    encoders = (kind for kind in PREFIXES if kind != "mmdit" and kind not in models)
    return any(spelled(name).startswith(spelled(prefix)) for kind in encoders for prefix in PREFIXES[kind])


def _targets(models: Mapping[Kind, nn.Module]) -> dict[str, tuple[Target, ...]]:
    """Where the layers of the models are, by every name that a file could give them."""
    targets: dict[str, list[Target]] = {}
    for kind, model in models.items():
        for layer, module in model.named_modules():
            if not hasattr(module, "in_features"):
                continue
            shape = (int(module.out_features), int(module.in_features))
            for name, rows in _names(kind, layer, shape, model):
                for prefix in PREFIXES[kind]:
                    named, target = targets.setdefault(spelled(prefix + name), []), Target(kind, layer, rows, shape)
                    if target not in named:  # some layers are called alike by all
                        named.append(target)
    return {name: tuple(several) for name, several in targets.items()}


def _names(
    kind: Kind, layer: str, shape: tuple[int, int], model: nn.Module
) -> Iterator[tuple[str, tuple[tuple[int, int, int], ...] | None]]:
    """What files call the matrices that make up a layer, and which of its rows each is."""
    yield layer, None
    if not isinstance(model, MMDiT):
        return
    pieces = pieces_in(kind, "diffusers", f"{layer}.weight", depth=model.config.depth)
    count = shape[0] // len(pieces)
    if any(piece.half is not None for piece in pieces):
        # One matrix whose halves are the other way round.
        rows = tuple((piece.half * count, i * count, count) for i, piece in enumerate(pieces) if piece.half is not None)
        yield pieces[0].name.removesuffix(".weight"), rows
        return
    for i, piece in enumerate(pieces):
        whole = len(pieces) == 1
        yield piece.name.removesuffix(".weight"), None if whole else ((0, i * count, count),)


def _delta(file: TensorFile, name: str, parts: Mapping[str, str], target: Target) -> tuple[Delta, Tensor | None]:
    """What a file says of one of its matrices, placed in our layer."""
    rows = target.shape[0] if target.rows is None else sum(count for _, _, count in target.rows)
    read = _Reader(file, name, parts)
    delta = next((made for make in (_lora, _lokr, _loha, _diff) if (made := make(read)) is not None), None)
    if delta is None:
        raise CorruptFileError(
            f"'{file.path}' has only {', '.join(sorted(parts.values()))} of '{name}': a part is missing."
        )
    shape = delta.shape
    if shape != (rows, target.shape[1]):
        raise WrongModelError(
            f"'{file.path}' changes '{name}' as a matrix of shape {list(shape)}, which is {[rows, target.shape[1]]} in "
            f"this model. {ADVICE}"
        )
    magnitude = None
    if "magnitude" in parts:
        magnitude = read("magnitude").flatten()
        if magnitude.numel() != rows:
            raise UnsupportedFormatError(
                f"'{file.path}' has {magnitude.numel()} lengths for '{name}', which has {rows} rows; only DoRA by "
                "rows is read."
            )
    if target.rows is None:
        return delta.delta, magnitude
    if magnitude is not None:
        magnitude = torch.cat([magnitude[start : start + count] for start, _, count in target.rows])
    return Rows(delta.delta, target.rows, target.shape[0]), magnitude


def _change(path: Path, layer: str, several: list[tuple[Target, Delta, Tensor | None]]) -> LayerChange:
    """All that a file does to one of our layers."""
    several = sorted(several, key=lambda each: each[0].rows or ())
    magnitudes = [magnitude for _, _, magnitude in several if magnitude is not None]
    magnitude = torch.cat(magnitudes) if magnitudes else None
    if magnitude is not None and magnitude.numel() != several[0][0].shape[0]:
        raise UnsupportedFormatError(f"'{path}' has DoRA's lengths for some rows of '{layer}' only; that is not read.")
    return LayerChange(tuple(delta for _, delta, _ in several), magnitude)


@dataclass(frozen=True, slots=True)
class _Made:
    delta: Delta
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the tensors of one layer by what they are."""

    file: TensorFile
    name: str
    parts: Mapping[str, str]

    def has(self, *parts: str) -> bool:
        return all(part in self.parts for part in parts)

    def __call__(self, part: str) -> Tensor:
        """float32, finite. A 1×1 convolution counts as the matrix that it is."""
        tensor = self.file.read(self.parts[part], torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise CorruptFileError(
                f"'{self.file.path}' has NaN or infinity in '{self.parts[part]}'. Download it again."
            )
        while tensor.ndim > 2 and tensor.shape[-1] == 1:
            tensor = tensor.squeeze(-1)
        if part not in ("alpha", "magnitude") and tensor.ndim != 2:
            raise UnsupportedFormatError(
                f"'{self.file.path}' changes '{self.name}' by '{self.parts[part]}' of shape {list(tensor.shape)}, a "
                "convolution; only linear layers can be changed."
            )
        return tensor

    def scale(self, rank: int) -> float:
        """alpha / rank; without alpha 1."""
        return float(self("alpha")) / rank if self.has("alpha") else 1.0

    def product(self, one: str, other: str) -> Tensor:
        """[a, r] · [r, b]"""
        a, b = self(one), self(other)
        if a.shape[1] != b.shape[0]:
            raise CorruptFileError(
                f"'{self.file.path}' has ranks that differ in '{self.parts[one]}' {list(a.shape)} and "
                f"'{self.parts[other]}' {list(b.shape)}. The file is damaged."
            )
        return a @ b


def _lora(read: _Reader) -> _Made | None:
    if not read.has("down", "up"):
        return None
    down, up = read("down"), read("up")
    if up.shape[1] != down.shape[0]:
        raise CorruptFileError(
            f"'{read.file.path}' has ranks that differ in '{read.parts['down']}' {list(down.shape)} and "
            f"'{read.parts['up']}' {list(up.shape)}. The file is damaged."
        )
    return _Made(LowRank(down, up * read.scale(len(down))), (up.shape[0], down.shape[1]))


def _lokr(read: _Reader) -> _Made | None:
    full = [read.has(each) for each in ("w1", "w2")]
    split = [read.has(f"{each}_a", f"{each}_b") for each in ("w1", "w2")]
    if not any(full) and "lokr" not in next(iter(read.parts.values())):
        return None
    if not all(a or b for a, b in zip(full, split, strict=True)):
        return None
    left, right = (read(each) if read.has(each) else read.product(f"{each}_a", f"{each}_b") for each in ("w1", "w2"))
    # alpha counts only where a factor has a rank to divide it by.
    ranks = [read(f"{each}_b").shape[0] for each, whole in zip(("w1", "w2"), full, strict=True) if not whole]
    scale = read.scale(ranks[-1]) if ranks else 1.0
    return _Made(Kronecker(left, right * scale), (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]))


def _loha(read: _Reader) -> _Made | None:
    if not read.has("w1_a", "w1_b", "w2_a", "w2_b"):
        return None
    one, other = read.product("w1_a", "w1_b"), read.product("w2_a", "w2_b")
    if one.shape != other.shape:
        raise CorruptFileError(
            f"'{read.file.path}' has factors of different shapes in '{read.name}'. The file is damaged."
        )
    scale, rank = read.scale(read("w1_b").shape[0]), read("w1_b").shape[0] * read("w2_b").shape[0]
    rows, columns = one.shape
    if rank * (rows + columns) >= rows * columns:
        return _Made(Dense(one * other * scale), (rows, columns))
    # A Hadamard product of two low-rank matrices has the rank of both multiplied, with these factors.
    up = (read("w1_a")[:, :, None] * read("w2_a")[:, None, :]).flatten(1)
    down = (read("w1_b")[:, None, :] * read("w2_b")[None, :, :]).flatten(0, 1)
    return _Made(LowRank(down, up * scale), (rows, columns))


def _diff(read: _Reader) -> _Made | None:
    if not read.has("diff"):
        return None
    weight = read("diff")
    return _Made(Dense(weight), (weight.shape[0], weight.shape[1]))


def _refuse(path: Path, file: TensorFile, layers: int, unknown: Sequence[str]) -> NoReturn:
    some = ", ".join(f"'{name}'" for name in unknown[:SHOWN])
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    if 2 * len(unknown) > layers:
        what = what_else(file.entries) or ("a U-Net" if any(map(_OF_A_UNET.search, unknown)) else "another model")
        raise WrongModelError(f"'{path}' is a LoRA for {what}: this model does not have {some}{more}. {ADVICE}")
    raise WrongModelError(f"'{path}' changes what this model does not have: {some}{more}. {ADVICE}")
