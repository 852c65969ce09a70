"""The folder of a comparison: what is drawn already, and under which settings, so that a stopped run goes on.

OUT/prompts.txt                       one prompt a line; picture 1 is the first line's
OUT/pictures/COLUMN/00001.png         pictures, each carrying its request
OUT/pictures/COLUMN/column.json       what drew them; other settings are refused
OUT/pictures/COLUMN/drawn.jsonl       one line a picture: seconds, memory, latent error
OUT/latents/00001.npy                 the reference's final latents, float32
OUT/velocity/                         the reference's run that all columns repeat, see `velocity`
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.pipeline.image import Picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """How one picture was drawn."""

    number: int  # counts from 1, as the prompts do
    seconds: float  # prompt to pixels
    denoise_seconds: float  # of these, evaluations of the model
    evaluations: int
    cold: bool  # the first after loading, which includes reading the weights
    host_bytes: int  # most memory of the process since this column began
    device_bytes: int | None  # likewise of the accelerator; None on a CPU
    latent_error: float | None  # relative to the reference's final latents; None for the reference


class Gallery:
    """The folder of one comparison.

    Args:
        folder: made if it is not there.
        prompts: in the order of their numbers.
        restart: throw away what the folder holds of an earlier comparison.

    Raises:
        RequestError: the folder holds pictures of other prompts, or is no folder of a comparison.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], *, restart: bool = False) -> None:
        self.folder = folder
        if restart:
            _remove_ours(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            listed = folder / "prompts.txt"
            drawn = any(folder.glob("pictures/*/column.json"))
            before = listed.read_text("utf-8").splitlines() if drawn else []
            _check_prompts(folder, before, prompts)
            # A shorter run keeps the longer list: the pictures beyond it are still there.
            lines = [_one_line(prompt) for prompt in prompts]
            write_text(listed, "\n".join([*lines, *before[len(lines) :]]) + "\n")
        except OSError as error:
            raise RequestError(
                f"Cannot write to {folder}: {error.strerror or error}. Choose another --report."
            ) from error

    def column(self, name: str, drawn_by: Mapping[str, Any]) -> GalleryColumn:
        """Where a column's pictures are; `drawn_by` says, as plain data, everything that they depend on.

        Raises:
            RequestError: pictures of this name are there that were drawn otherwise.
        """
        return GalleryColumn(self.folder / "pictures" / slug(name), name, drawn_by)

    def keep_latents(self, number: int, latents: Tensor) -> None:
        """Remember the reference's final latents [1, 16, h, w] of a picture."""
        path = self._latents(number)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part.npy")
        np.save(part, latents.float().cpu().numpy())
        part.replace(path)

    def latents(self, number: int) -> Tensor | None:
        """The reference's final latents of a picture, if they are there."""
        path = self._latents(number)
        return torch.from_numpy(np.load(path)) if path.exists() else None

    def _latents(self, number: int) -> Path:
        return self.folder / "latents" / f"{number:05}.npy"


class GalleryColumn:
    """The pictures of one column, and how they were drawn."""

    def __init__(self, folder: Path, name: str, drawn_by: Mapping[str, Any]) -> None:
        self.folder, self.name = folder, name
        plain = json.loads(json.dumps(drawn_by))
        settings = folder / "column.json"
        folder.mkdir(parents=True, exist_ok=True)
        if settings.exists():
            before = json.loads(settings.read_text("utf-8"))
            if changed := [key for key in sorted({*plain, *before}) if plain.get(key) != before.get(key)]:
                told = "; ".join(f"{key} was {before.get(key)!r}, now {plain.get(key)!r}" for key in changed)
                raise RequestError(
                    f"The pictures of '{name}' in {folder} were drawn otherwise: {told}. Pass --restart to draw all of "
                    "them anew, or choose another --report."
                )
        else:
            write_text(settings, json.dumps(plain, indent=1))
        self.records = self._read_records()

    def path(self, number: int) -> Path:
        """Where picture `number` is, or will be."""
        return self.folder / f"{number:05}.png"

    def add(self, picture: Picture, record: Record) -> None:
        """Keep a picture: the file first, so that a line always has its picture."""
        picture.save(self.path(record.number))
        with (self.folder / "drawn.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(record)) + "\n")
        self.records[record.number] = record

    def _read_records(self) -> dict[int, Record]:
        path = self.folder / "drawn.jsonl"
        known = {field.name for field in fields(Record)}
        records: dict[int, Record] = {}
        whole = []
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            try:
                values = json.loads(line)
                record = Record(**{key: value for key, value in values.items() if key in known})
            except (ValueError, TypeError, AttributeError):
                continue  # half a line, cut by whatever stopped the run: its picture is drawn again
            whole.append(line)
            if self.path(record.number).exists():
                records[record.number] = record
        if path.exists():
            # What follows must not be written behind half a line.
            write_text(path, "".join(f"{line}\n" for line in whole))
        return records


def slug(name: str) -> str:
    """A column's name as a folder's: letters, digits, dots, dashes."""
    return re.sub(r"[^A-Za-z0-9.@_-]+", "-", name).strip("-.") or "column"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, "utf-8")
    part.replace(path)


def _remove_ours(folder: Path) -> None:
    """Remove what comparisons made, and nothing else: a folder called pictures may be anyone's."""
    for column in folder.glob("pictures/*/column.json"):
        shutil.rmtree(column.parent)
    for file in (*folder.glob("latents/[0-9]*.npy"), *folder.glob("velocity/[0-9]*.safetensors")):
        file.unlink()


def _one_line(prompt: str) -> str:
    return " ".join(prompt.split())


def _check_prompts(folder: Path, before: Sequence[str], prompts: Sequence[str]) -> None:
    """Refuse other prompts than those of the pictures that are there; more or fewer of the same are welcome."""
    for number, (was, now) in enumerate(zip(before, prompts, strict=False), 1):
        if was != _one_line(now):
            raise RequestError(
                f"{folder} holds pictures of other prompts: number {number} was '{was}', now '{_one_line(now)}'. Pass "
                "--restart to draw everything anew, or choose another --report."
            )
