"""Safetensors headers, and indexes of shards, parsed and checked before a byte of data is believed.

A file is: 8 bytes with the header's length (little endian) · the header, a JSON object in UTF-8 · the data. The header
gives each tensor's dtype, shape and place in the data. Nothing here imports torch; the data is read in `tensors`.

Format: https://github.com/huggingface/safetensors#format, whose rules are all checked here: no duplicate keys, no
overlaps, no holes, sizes that follow from dtype and shape.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeGuard

from octavo.errors import CheckpointError, CorruptFileError, ModelNotFoundError, UnsupportedFormatError

INDEX_NAME = ".safetensors.index."  # as in model.safetensors.index.json, ….index.fp16.json
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's own bound
MAX_RANK = 32
MAX_SIDE = 2**40  # elements along one side; more would not fit in any file

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
    # Known to the format and refused by name when such a tensor is read.
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64,
}  # fmt: skip

# First bytes of files that people take for safetensors, and what to tell them.
PICKLE_REMEDY = (
    "Such files can run code when they are opened, so Octavo does not read them. "
    "Use the .safetensors version of the model, or convert the file with a tool that you trust."
)
FOREIGN_BEGINNINGS: tuple[tuple[bytes, type[CheckpointError], str], ...] = (
    (b"PK\x03\x04", UnsupportedFormatError, f"is a PyTorch pickle (a zip archive), not safetensors. {PICKLE_REMEDY}"),
    (b"\x80\x02", UnsupportedFormatError, f"is a PyTorch pickle, not safetensors. {PICKLE_REMEDY}"),
    (b"GGUF", UnsupportedFormatError, "is a GGUF file. Octavo reads .safetensors: download that version of the model."),
    (b"version https://git-lfs", CorruptFileError,
     "is a Git LFS pointer, not the model itself. Run 'git lfs pull', or download the file again."),
    (b"<!DOCTYPE", CorruptFileError, "is a web page, not a model. Download it again; gated models need you logged in."),
    (b"<html", CorruptFileError, "is a web page, not a model. Download it again; gated models need you logged in."),
    (b"Entry not found", CorruptFileError, "is a hub's error message, not a model. Check the name and download again."),
)  # fmt: skip
PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    name: str
    dtype: str  # spelled as in the file: BF16, F8_E4M3 ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """All that a file says of itself."""

    path: Path
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]


def read_header(path: Path) -> Header:
    """The checked header of the safetensors file at `path`.

    Raises:
        ModelNotFoundError: there is no such file.
        UnsupportedFormatError: it is a pickle or GGUF file.
        CorruptFileError: it is truncated, or its header breaks a rule of the format.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"There is no file '{path}'. Check the name; 'octavo models' lists what is there.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            beginning = file.read(32)
            _refuse_foreign(path, beginning)
            if size < LENGTH_BYTES:
                _refuse(path, f"is {size} bytes long, too short for a safetensors file")
            length = int.from_bytes(beginning[:LENGTH_BYTES], "little")
            if length > MAX_HEADER_BYTES:
                _refuse(path, f"claims a header of {length} bytes; the format allows {MAX_HEADER_BYTES}")
            if LENGTH_BYTES + length > size:
                _refuse(path, f"is {size} bytes long, but its header alone should be {length}: it is cut off")
            file.seek(LENGTH_BYTES)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    return _parse(path, text, data_start=LENGTH_BYTES + length, data_bytes=size - LENGTH_BYTES - length)


def read_headers(path: Path) -> tuple[Header, ...]:
    """The headers of all files that `path` leads to: of itself, or of the shards if it is an index of them.

    Raises:
        ModelNotFoundError: there is no such file.
        CheckpointError: it, or one of its shards, is damaged, missing or of a format that is not read.
    """
    if INDEX_NAME not in path.name:
        return (read_header(path),)
    weight_map = _read_index(path)
    headers = []
    for shard in sorted(set(weight_map.values())):
        if not (path.parent / shard).is_file():
            raise CorruptFileError(f"'{path}' names the shard '{shard}', which is not beside it. Download it too.")
        headers.append(read_header(path.parent / shard))
    held = {header.path.name: header.entries for header in headers}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise CorruptFileError(f"'{path}' promises '{name}' in '{shard}', which has no such tensor. Download both.")
    names = [name for header in headers for name in header.entries]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise CorruptFileError(f"'{path}' leads to '{repeated}' in two shards. Download the shards again.")
    return tuple(headers)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to shard name, as the index at `path` has them."""
    if not path.is_file():
        raise ModelNotFoundError(f"There is no file '{path}'. Check the name.")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    try:
        weight_map = json.loads(text)["weight_map"]
        shards = [Path(shard) for shard in weight_map.values()]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"'{path}' is not an index of shards ({error!r:.80}). Download it again.") from error
    # A shard lies beside its index; a name that leads elsewhere is an attempt to read other files.
    if not shards or any(shard.name != str(shard) or not shard.name for shard in shards):
        raise CorruptFileError(f"'{path}' names no shards, or shards outside its own folder. Download it again.")
    return {str(name): str(shard) for name, shard in weight_map.items()}


def _parse(path: Path, text: bytes, *, data_start: int, data_bytes: int) -> Header:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            _refuse(path, f"names '{repeated}' twice in its header")
        return table

    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"has a header that is not JSON in UTF-8 ({error})", cause=error)
    if not isinstance(fields, dict):
        _refuse(path, f"has a header that is a JSON {type(fields).__name__}, not an object")

    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "has '__metadata__' that does not map strings to strings")

    entries: dict[str, Entry] = {}
    for name, field in fields.items():
        entries[name] = _entry(path, name, field, data_start, data_bytes)
    _check_packing(path, entries, data_start, data_bytes)
    return Header(path, metadata, entries)


def _entry(path: Path, name: str, field: object, data_start: int, data_bytes: int) -> Entry:
    if not isinstance(field, dict):
        _refuse(path, f"describes '{name}' by {field!r:.60}, not by dtype, shape and data_offsets")
    dtype, shape, offsets = field.get("dtype"), field.get("shape"), field.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse(path, f"gives '{name}' the unknown dtype {dtype!r:.60}")
    if not _whole_numbers(shape) or len(shape) > MAX_RANK or any(side > MAX_SIDE for side in shape):
        _refuse(path, f"gives '{name}' the impossible shape {shape!r:.60}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        _refuse(path, f"gives '{name}' the impossible data_offsets {offsets!r:.60}")
    begin, end = offsets
    if end > data_bytes:
        _refuse(path, f"should hold '{name}' up to data byte {end}, but ends at {data_bytes}: it is cut off")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        _refuse(path, f"gives '{name}' {end - begin} bytes; {dtype} of shape {list(shape)} takes {bits / 8:g}")
    return Entry(path, name, dtype, tuple(shape), data_start + begin, end - begin)


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    # JSON's true and false are ints in Python.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_packing(path: Path, entries: Mapping[str, Entry], data_start: int, data_bytes: int) -> None:
    position, previous = data_start, "the header"
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start < position:
            _refuse(path, f"has '{entry.name}' overlapping '{previous}'")
        if entry.start > position:
            _refuse(path, f"has {entry.start - position} unclaimed bytes between '{previous}' and '{entry.name}'")
        position, previous = entry.start + entry.nbytes, entry.name
    if position < data_start + data_bytes:
        _refuse(path, f"has {data_start + data_bytes - position} unclaimed bytes after '{previous}'")


def _refuse_foreign(path: Path, beginning: bytes) -> None:
    for magic, error, says in FOREIGN_BEGINNINGS:
        if beginning.startswith(magic):
            raise error(f"'{path}' {says}")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsupportedFormatError(f"'{path}' has a pickle's name, not safetensors. {PICKLE_REMEDY}")


def _refuse(path: Path, what: str, cause: BaseException | None = None) -> NoReturn:
    raise CorruptFileError(f"'{path}' {what}. Download or make the file again.") from cause
