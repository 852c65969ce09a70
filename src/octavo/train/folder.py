"""A folder of pictures with captions → latents and conditioning, made once and kept in a file.

A caption stands in a text file beside its picture (fox.png, fox.txt), or in metadata.jsonl, a line for each picture:
{"file_name": "fox.png", "text": "a red fox"}, as datasets of Hugging Face have it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.errors import RequestError
from octavo.pipeline.components import Components
from octavo.pipeline.encode import Conditioning, encode
from octavo.pipeline.image import open_image
from octavo.pipeline.latents import FACTOR, latents_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"


@dataclass(frozen=True, slots=True)
class Example:
    """A picture and what it shows."""

    picture: Path
    caption: str


@dataclass(frozen=True, slots=True)
class Lesson:
    """An example as the model is told it."""

    latents: Tensor  # [1, 16, h, w] float32
    prompt: Conditioning


@dataclass(frozen=True, slots=True)
class Lessons:
    """All of a folder, on the CPU."""

    lessons: Sequence[Lesson]
    empty: Conditioning  # of no text, for guidance

    @property
    def groups(self) -> list[list[Lesson]]:
        """Those that can share a call: of one size, and with texts of one length."""
        by_shape: dict[tuple[object, ...], list[Lesson]] = {}
        for lesson in self.lessons:
            by_shape.setdefault((lesson.latents.shape, lesson.prompt.context.shape), []).append(lesson)
        return list(by_shape.values())


def read_examples(folder: Path, *, caption: str | None = None) -> list[Example]:
    """The pictures of a folder, by name.

    Args:
        caption: of those that have none of their own.

    Raises:
        RequestError: no folder, no pictures, a caption that is missing or cannot be read.
    """
    if not folder.is_dir():
        raise RequestError(f"There is no folder '{folder}' with pictures to learn from.")
    listed = dict(_listed(folder))
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    missing = [name for name in listed if folder / name not in pictures]
    if missing:
        raise RequestError(f"'{folder / METADATA}' names '{missing[0]}', and there is no such picture.")
    if not pictures:
        raise RequestError(f"'{folder}' has no pictures: {', '.join(SUFFIXES)} are read.")
    examples = []
    for path in pictures:
        beside = path.with_suffix(".txt")
        text = listed.get(path.relative_to(folder).as_posix())
        if text is None and beside.is_file():
            text = _text(beside)
        text = caption if text is None else text
        if text is None:
            raise RequestError(
                f"'{path}' has no caption: write what it shows into '{beside.name}' beside it or into {METADATA}, or "
                "give --caption for all that have none."
            )
        examples.append(Example(path, " ".join(text.split())))
    return examples


def read_lessons(
    components: Components,
    examples: Sequence[Example],
    *,
    area: int,
    step: int,
    cache: Path,
    report: Callable[[str], None] = lambda _line: None,
) -> Lessons:
    """Encode the examples, or read what was encoded of the very same before.

    Args:
        components: the model; its VAE and text encoders do the work, and leave memory afterwards where it is short.
        area: pixels that each picture is brought to, at about its own proportions; it is cropped around its middle.
        step: pixels, of which both sides are multiples.
        cache: the file, written if it is not there or of something else.
        report: gets a line of text where something is encoded.

    Raises:
        RequestError: a picture that cannot be read.
    """
    key = _fingerprint(components, examples, area, step)
    if not cache.is_file() or _noted(cache) != key:
        report(f"Encoding {len(examples)} pictures and their captions …")
        tensors = _encoded(components, examples, area, step)
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, cache, metadata={"key": key})
    tensors = load_file(cache)

    def prompt(i: int) -> Conditioning:
        return Conditioning(tensors[f"context.{i}"], tensors[f"pooled.{i}"])

    texts = _texts(examples)
    prompts = {text: prompt(i) for i, text in enumerate(texts)}
    lessons = [Lesson(tensors[f"latents.{i}"], prompts[each.caption]) for i, each in enumerate(examples)]
    return Lessons(lessons, prompts[""])


def size_for(width: int, height: int, area: int, step: int) -> tuple[int, int]:
    """Sides in pixels, multiples of `step`, of about `area` together and of nearly these proportions."""
    factor = (area / (width * height)) ** 0.5
    sides = (max(step, round(side * factor / step) * step) for side in (width, height))
    across, down = sides
    return across, down


def _texts(examples: Sequence[Example]) -> list[str]:
    return list(dict.fromkeys(["", *(each.caption for each in examples)]))


@torch.no_grad()
def _encoded(components: Components, examples: Sequence[Example], area: int, step: int) -> dict[str, Tensor]:
    dtype = components.dtype
    tensors: dict[str, Tensor] = {}
    for i, text in enumerate(_texts(examples)):
        said = encode(components.text, text).to(torch.device("cpu"), dtype)
        tensors[f"context.{i}"], tensors[f"pooled.{i}"] = said.context.contiguous(), said.pooled.contiguous()
    components.make_room_for(components.vae, *components.encoders)
    longest = components.max_side // FACTOR * FACTOR
    for i, example in enumerate(examples):
        image = open_image(example.picture)
        width, height = size_for(image.width, image.height, area, step)
        if max(width, height) > longest:
            raise RequestError(
                f"'{example.picture}' would be {width}x{height}; this model knows positions up to {longest} pixels a "
                "side. Crop it, or train at a smaller --size."
            )
        latents = latents_of(image, components.vae(), width=width, height=height)
        tensors[f"latents.{i}"] = latents.float().cpu().contiguous()
    components.make_room_for(components.mmdit, components.vae, *components.encoders)
    return tensors


def _fingerprint(components: Components, examples: Sequence[Example], area: int, step: int) -> str:
    """Of all that the encoded numbers depend on."""
    digest = hashlib.sha256(f"{components.name} {components.dtype} {area} {step}".encode())
    for part in (components.vae, *components.encoders):
        digest.update(f"{part.path} {part.path.stat().st_mtime_ns}".encode())
    for example in examples:
        digest.update(example.picture.read_bytes())
        digest.update(b"\0" + example.caption.encode() + b"\0")
    return digest.hexdigest()


def _noted(cache: Path) -> str | None:
    try:
        with safe_open(cache, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except Exception:  # of the library, of many kinds: whatever it is, the file is made anew
        return None
    return metadata.get("key")


def _listed(folder: Path) -> Iterator[tuple[str, str]]:
    """The captions in metadata.jsonl, by the name of the picture."""
    path = folder / METADATA
    if not path.is_file():
        return
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry.get("text", entry.get("caption"))
        except (ValueError, KeyError, TypeError, AttributeError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            raise RequestError(
                f'\'{path}\', line {number}: need {{"file_name": …, "text": …}}, a line for each picture.'
            )
        yield name, text


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise RequestError(f"'{path}' cannot be read as text: {error}.") from error
