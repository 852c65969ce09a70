"""Where files go that nodes save, and what they are called: ComfyUI's `prefix_00001_.png`.

A prefix may name folders and hold `%variables%`. Numbers go on from the largest that is there, and no two jobs ever
take the same one. A file appears whole or not at all, and never outside of its folder.
"""

import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.places import inside

if sys.platform != "win32":
    import fcntl

Write = Callable[[Path], None]

_numbering = Lock()


def save_all(
    context: Context, kind: str, prefix: str, suffix: str, writes: Sequence[Write], *, width: int = 0, height: int = 0
) -> list[dict[str, str]]:
    """Save files that belong together, numbered one after the other.

    Args:
        context: gives the folders, and is told of each file before it appears.
        kind: "output" or "temp", the folder.
        prefix: `folder/name` with variables, see `filled`; `%batch_num%` becomes the place in the batch.
        suffix: with its dot.
        writes: each writes one file to the path it is given.
        width, height: of the pictures, for the prefix.

    Returns:
        What ComfyUI tells of each: `filename`, `subfolder` and `type`.

    Raises:
        RequestError: the prefix leads out of the folder or is no name, or the files cannot be written.
    """
    root: Path = getattr(context, f"{kind}_dir")
    folder, name = _place(root, filled(prefix, context, width, height))
    names = [name.replace("%batch_num%", str(i)) for i in range(len(writes))]
    parts = [folder / f".{uuid.uuid4().hex}.part" for _ in writes]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for write, part in zip(writes, parts, strict=True):
            context.check()
            context.note_file(part)
            write(part)
        files = _publish(context, folder, names, suffix, parts)
    except OSError as error:
        raise RequestError(f"Cannot write {prefix}{suffix}: {error.strerror or error}.") from error
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    subfolder = folder.relative_to(root.resolve()).as_posix()
    return [{"filename": file, "subfolder": "" if subfolder == "." else subfolder, "type": kind} for file in files]


def _publish(context: Context, folder: Path, names: Sequence[str], suffix: str, parts: Sequence[Path]) -> list[str]:
    """Give finished files their names, with numbers that nobody has."""
    files = []
    with _alone_in(folder):
        number = _next_number(folder, names)
        for name, part in zip(names, parts, strict=True):
            while not _reserved(context, target := folder / f"{name}_{number:05}_{suffix}"):
                number += 1
            os.replace(part, target)
            files.append(target.name)
            number += 1
    return files


def _reserved(context: Context, target: Path) -> bool:
    """Note a file before it appears; False where the name is taken, or another job has noted it."""
    if target.exists():
        return False
    try:
        context.note_file(target)
    except FileExistsError:
        return False
    return True


def _next_number(folder: Path, names: Sequence[str]) -> int:
    """One more than the largest number behind one of the names."""
    numbered = re.compile(f"(?:{'|'.join(map(re.escape, dict.fromkeys(names)))})_([0-9]{{1,15}})(?:_.*)?", re.DOTALL)
    found = (numbered.fullmatch(entry) for entry in os.listdir(folder))
    return 1 + max((int(match[1]) for match in found if match), default=0)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Nobody else gives numbers in this folder meanwhile: no thread, and but for Windows no other process."""
    with _numbering:
        if sys.platform == "win32":
            yield
            return
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _place(root: Path, prefix: str) -> tuple[Path, str]:
    """The folder and the first part of the names that a prefix means."""
    if re.search(r"[\x00-\x1f\x7f]", prefix):
        raise RequestError(f"filename_prefix {prefix[:200]!r} holds a control character: leave it out.")
    # Workflows made on Windows part folders with backslashes.
    path = os.path.normpath(prefix.replace("\\", "/")) if prefix.strip() else ""
    subfolder, name = os.path.split(path)
    if name in ("", ".", ".."):
        raise RequestError(f"filename_prefix {prefix[:200]!r} names no file: give it a name, such as 'ComfyUI'.")
    return (inside(root, subfolder) if subfolder else root.resolve()), name


# Variables


def filled(prefix: str, context: Context, width: int, height: int, now: datetime | None = None) -> str:
    """The prefix with its variables replaced; one that means nothing stays as it is.

    `%width%`, `%height%`; `%year%`, `%month%`, `%day%`, `%hour%`, `%minute%`, `%second%`; `%date%` or
    `%date:yyyy-MM-dd hh.mm.ss%`; `%Node.input%`, the value of an input of the node with that title or class. ComfyUI's
    web page replaces the last two before it sends a prompt, its server the others.
    """
    now = now or datetime.now()
    plain = {"width": str(width), "height": str(height), "year": str(now.year), "date": f"{now:%Y-%m-%d}"}
    plain |= {name: f"{getattr(now, name):02}" for name in ("month", "day", "hour", "minute", "second")}

    def replaced(match: re.Match[str]) -> str:
        word = match[1]
        if word in plain:
            return plain[word]
        if word.startswith("date:"):
            return _date(now, word.removeprefix("date:"))
        title, dot, name = word.rpartition(".")
        value = _input_of(context, title, name) if dot else None
        return match[0] if value is None else value

    return re.sub("%([^%]+)%", replaced, prefix)


def _date(now: datetime, form: str) -> str:
    """The time in the web page's way: d, M, h, m, s, each once or doubled to fill two places; yy, yyyy."""
    values = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}

    def written(match: re.Match[str]) -> str:
        letters = match[0]
        if letters[0] == "y":
            return f"{now.year:04}"[-len(letters) :]
        return str(values[letters[0]]).zfill(len(letters))

    return re.sub("dd?|MM?|hh?|mm?|ss?|yyyy|yy", written, form)


def _input_of(context: Context, title: str, name: str) -> str | None:
    """The value of an input as part of a file's name; None if there is no such node, or the input is linked."""
    for node in _called(context, title):
        inputs = node.get("inputs")
        value = inputs.get(name) if isinstance(inputs, Mapping) else None
        if isinstance(value, bool):
            value = str(value).lower()
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str | int | float):
            return re.sub(r'[/?<>\\:*|"\x00-\x1f\x7f]', "_", str(value))
    return None


def _called(context: Context, title: str) -> Iterator[Mapping[str, Any]]:
    """The nodes of the prompt with that name: the one for file names, which only the web page knows; class; title."""
    workflow = context.extra_pnginfo.get("workflow")
    drawn = workflow.get("nodes") if isinstance(workflow, Mapping) else None
    for each in drawn if isinstance(drawn, list) else ():
        properties = each.get("properties") if isinstance(each, Mapping) else None
        if isinstance(properties, Mapping) and properties.get("Node name for S&R") == title:
            yield context.prompt.get(str(each.get("id")), {})
    nodes = [node for node in context.prompt.values() if isinstance(node, Mapping)]
    yield from (node for node in nodes if node.get("class_type") == title)
    for node in nodes:
        meta = node.get("_meta")
        if isinstance(meta, Mapping) and meta.get("title") == title:
            yield node
