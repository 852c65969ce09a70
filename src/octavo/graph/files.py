"""Workflows from files: JSON in either of ComfyUI's formats, and pictures that carry one.

ComfyUI and Octavo keep the prompt and the page's workflow in the pictures that they save: in PNG as texts called
`prompt` and `workflow`, in WebP and JPEG as EXIF texts that begin with these words. The prompt is what was run, so it
comes first.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from octavo.errors import RequestError
from octavo.graph.fragment import looks_like_nodes
from octavo.graph.frontend import is_frontend_format, to_prompt
from octavo.graph.spec import Lists, NodeSpec
from octavo.graph.values import fault, shortened
from octavo.graph.workflow import InvalidPrompt, check_depth

PICTURES = (".png", ".webp", ".jpg", ".jpeg")
LARGEST_TEXT = 64 << 20  # bytes of a workflow's JSON


@dataclass(frozen=True, slots=True)
class Found:
    """A workflow out of a file."""

    prompt: Any  # in the API format; not checked yet
    page: Mapping[str, Any] | None = None  # the web page's workflow, where the file has it

    @property
    def extra_pnginfo(self) -> dict[str, Any]:
        """What pictures keep beside the prompt, so that the page can open them."""
        return {} if self.page is None else {"workflow": self.page}


def read_workflow(path: Path, specs: Mapping[str, NodeSpec], lists: Lists) -> Found:
    """The workflow in a file.

    Args:
        path: JSON, or a picture that ComfyUI or Octavo saved.
        specs, lists: for the page's format, see `frontend.to_prompt`.

    Raises:
        RequestError: no such file, one of another kind, or a picture without a workflow.
        InvalidPrompt: the workflow is damaged.
    """
    if path.suffix.lower() in PICTURES:
        texts = _texts_of(path)
        if not texts:
            raise RequestError(_nothing_in(path))
        prompt, page = (parse_json(texts[key]) if key in texts else None for key in ("prompt", "workflow"))
        page = page if is_frontend_format(page) else None
        if prompt is None and page is None:
            raise RequestError(_nothing_in(path))
        return Found(to_prompt(page, specs, lists) if prompt is None else prompt, page)
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise RequestError(f"{path.name} is too large for a workflow ({LARGEST_TEXT >> 20} MB are allowed).")
        text = path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"There is no file {path}.") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from error
    return from_json(parse_json(text), specs, lists)


def from_json(given: Any, specs: Mapping[str, NodeSpec], lists: Lists) -> Found:
    """A workflow out of JSON: a prompt, a page, or what was posted to a server, `{"prompt": …, "extra_data": …}`.

    Raises:
        InvalidPrompt: a damaged page.
    """
    check_depth(given)
    if is_frontend_format(given):
        return Found(to_prompt(given, specs, lists), given)
    if isinstance(given, Mapping) and "prompt" in given and "class_type" not in _as_node(given["prompt"]):
        extra_data = _as_node(given.get("extra_data"))
        page = _as_node(extra_data.get("extra_pnginfo")).get("workflow")
        return Found(given["prompt"], page if is_frontend_format(page) else None)
    return Found(given)


def _as_node(given: Any) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else {}


def parse_json(text: str | bytes) -> Any:
    """JSON as a file has it; nodes one after the other, with commas between but no brackets around, are a list.

    Raises:
        InvalidPrompt: it is no JSON; where, and what is there.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _no_json(f"it is no text (byte {error.start} is not UTF-8)") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        nodes = _nodes_in_a_row(text)
        if nodes is not None:
            return nodes
        where = f"line {error.lineno}, column {error.colno}"
        raise _no_json(f"{error.msg} at {where}: {shortened(text[error.pos :].strip(), 40) or 'the end'}") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, thousands of brackets
        raise _no_json(shortened(error)) from error


def _nodes_in_a_row(text: str) -> Any:
    """`{…}, {…}` as a list, if that is what it is."""
    try:
        given = json.loads(f"[{text.strip().strip(',')}]")
    except (ValueError, RecursionError):
        return None
    return given if looks_like_nodes(given) else None


def _no_json(details: str) -> InvalidPrompt:
    return InvalidPrompt(fault("invalid_json", "The workflow is no JSON", details))


def _texts_of(path: Path) -> dict[str, str]:
    """`prompt` and `workflow` as a picture carries them, and "octavo" where that is all; none of these if none.

    Raises:
        RequestError: no such file, or no picture.
    """
    try:
        with Image.open(path, formats=("PNG", "WEBP", "JPEG")) as image:
            texts = _kept(image)
            if not texts and image.format == "PNG":
                image.load()  # texts may follow the pixels
                texts = _kept(image)
            return texts
    except FileNotFoundError:
        raise RequestError(f"There is no file {path}.") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{path.name} cannot be read as a picture: {error}.") from error


def _kept(image: Image.Image) -> dict[str, str]:
    texts = {key: image.info[key] for key in ("prompt", "workflow") if isinstance(image.info.get(key), str)}
    for value in image.getexif().values():
        key, _, text = value.partition(":") if isinstance(value, str) else ("", "", "")
        if key.lower() in ("prompt", "workflow"):
            texts.setdefault(key.lower(), text.rstrip("\0"))
    return texts


def _nothing_in(path: Path) -> str:
    text = f"{path.name} carries no workflow. ComfyUI writes it into the pictures that it saves"
    try:
        with Image.open(path) as image:
            if "octavo" in image.info:
                return f"{path.name} was drawn without a workflow. Draw it again with: octavo generate --from {path}"
            if "parameters" in image.info:
                return f"{text}; this one has AUTOMATIC1111's parameters instead."
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        pass
    return f"{text}, but a program that edits or passes on pictures may take it out."
