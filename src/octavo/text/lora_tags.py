r"""LoRAs that a prompt asks for, in AUTOMATIC1111's words.

    <lora:name>          at full strength
    <lora:name:0.8>      at strength 0.8
    <lora:name:0.5:0.8>  at 0.5 in the text encoders and at 0.8 in the model
    \<lora:name>         text, nothing more

A tag may stand anywhere; what is left of the prompt is what the text encoders read. A "<" that begins no tag is text.
"""

import math
import re
from dataclasses import dataclass

from octavo.errors import RequestError

_TAG = re.compile(r"(\\?)<lora:([^<>]*)>", re.IGNORECASE)
_ESCAPED = re.compile(r"\\(<lora:)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Tag:
    """A LoRA asked for by name."""

    name: str
    strength: float = 1.0
    text_strength: float | None = None  # in the text encoders; None for the same


def split_tags(prompt: str) -> tuple[str, list[Tag]]:
    """The prompt without its tags, and the tags in order. Escaped ones stay, with their backslash; see `spoken`.

    Raises:
        RequestError: a tag without name, or with a strength that is no number.
    """
    tags: list[Tag] = []

    def take(match: re.Match[str]) -> str:
        if match[1]:
            return match[0]
        tags.append(_tag(match[0], match[2]))
        return ""

    rest = _TAG.sub(take, prompt)
    if not tags:
        return prompt, []
    # Where a tag was, two gaps have become one.
    return re.sub(r"[ \t]{2,}", " ", rest).strip(" \t"), tags


def spoken(prompt: str) -> str:
    """What the text encoders read of a prompt without tags: escaped ones without their backslash."""
    return _ESCAPED.sub(r"\1", prompt)


def as_tag(name: str, strength: float, text_strength: float | None = None) -> str:
    """The tag that asks for this LoRA."""
    both = "" if text_strength in (None, strength) else f"{text_strength:g}:"
    return f"<lora:{name}:{both}{strength:g}>"


def _tag(whole: str, inside: str) -> Tag:
    name, *numbers = (part.strip() for part in inside.split(":"))
    if not name or len(numbers) > 2:
        raise RequestError(f"{whole}: write <lora:name:strength>, or \\<lora: for the words themselves.")
    strengths = [_number(whole, number) for number in numbers]
    if len(strengths) == 2:
        return Tag(name, strengths[1], strengths[0])
    return Tag(name, *strengths)


def _number(whole: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RequestError(f"{whole}: the strength '{text}' is not a number; write <lora:name:0.8>.")
    return number
