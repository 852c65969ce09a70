"""AUTOMATIC1111's `parameters` text in pictures: found, and taken apart."""

import io
import json
import re

from PIL import ExifTags, Image

UNICODE = b"UNICODE\0"  # what EXIF text in UTF-16 starts with
PAIR = re.compile(r'\s*([\w ]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
LONGEST_LINE = 4000  # letters of a line of settings; more are words
LEAST_PAIRS = 3  # on a last line that is settings and not words


def parameters_in(data: bytes) -> tuple[str, dict[str, str]]:
    """The `parameters` of a picture file, "" where it has none, and all texts that it carries.

    Args:
        data: a picture that has been checked, see `limits.open_picture`.
    """
    image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    items = {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}
    exif = image.getexif()
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if isinstance(comment, bytes) and comment.startswith(UNICODE):
        items["parameters"] = comment.removeprefix(UNICODE).decode("utf-16-be", "replace")
    described = exif.get(ExifTags.Base.ImageDescription)
    if isinstance(described, str):
        items["octavo"] = described
    return items.get("parameters", ""), items


def parsed(text: str) -> dict[str, str]:
    """The settings in a `parameters` text by A1111's names: the words under "Prompt" and "Negative prompt"."""
    lines = text.strip().split("\n")
    pairs = PAIR.findall(lines[-1]) if len(lines[-1]) <= LONGEST_LINE else []
    pairs = pairs if len(pairs) >= LEAST_PAIRS else []
    words = "\n".join(lines[:-1] if pairs else lines)
    prompt, _, negative = words.partition("Negative prompt:")
    found = {"Prompt": prompt.strip(), "Negative prompt": negative.strip()}
    for key, value in pairs:
        found[key.strip()] = _unquoted(value.strip())
    return found if text.strip() else {}


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
