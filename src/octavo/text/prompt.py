r"""What a prompt says beyond its words: weights, escapes, references to textual-inversion embeddings.

    (a cat)          1.1 times the weight of what is around it; nesting multiplies
    (a cat:1.3)      weight 1.3, whatever is around it
    \( and \)        a bracket that is part of the text; nothing else needs escaping
    [a cat]          nothing special: square brackets are text
    embedding:name   the vectors of the embedding `name`, at the start of a run of text or after white space

A bracket without a partner is text, and so is a weight that is not a finite number. ComfyUI reads well-formed prompts
the same way; in others it leaves all that follows an unclosed bracket unread, and lets a stray ")" spoil the next pair.

How a prompt's tokens are cut into chunks is in `chunks`, the whole way from prompt to tokens in `tokenizers`.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BRACKET_WEIGHT = 1.1
GREATEST_WEIGHT = 10_000.0  # keeps weighted rows finite in 16 bits, however deep the nesting

_BRACKET = re.compile(r"\\[()]|[()]")
_NUMBER = re.compile(r"\s*[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\s*")
_REFERENCE = re.compile(r"(?<!\S)embedding:(\S+)")
_TRAILING_PUNCTUATION = ",.;:!?"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of text under one weight, its escapes resolved."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Reference:
    """An embedding asked for by name, without the file's suffix."""

    name: str


def parse_weights(prompt: str) -> list[Segment]:
    """Split a prompt into runs of equal weight, in order; empty runs are left out.

    Args:
        prompt: any string at all. Lone surrogates, which UTF-8 cannot carry, become U+FFFD.

    Returns:
        Segments; weights are in [-10000, 10000], and 1.0 outside brackets.
    """
    prompt = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    segments: list[Segment] = []
    groups = [(1.0, len(prompt))]  # innermost last: its weight, where its text ends
    begin = 0
    for opening, closing in sorted(_pairs(prompt).items()):
        is_opening = prompt[opening] == "("
        weight, stop = groups[-1]
        text = unescape(prompt[begin : opening if is_opening else stop])
        if text:
            segments.append(Segment(text, weight))
        if is_opening:
            groups.append(_group(prompt, opening, closing, around=weight))
        else:
            groups.pop()
        begin = opening + 1
    if begin < len(prompt):
        segments.append(Segment(unescape(prompt[begin:]), 1.0))
    return segments


def escape(text: str) -> str:
    """The prompt that stands for `text` itself, with no weights."""
    return re.sub(r"[()]", r"\\\g<0>", text)


def unescape(text: str) -> str:
    """Bare brackets for escaped ones."""
    return re.sub(r"\\([()])", r"\1", text)


def split_references(text: str, known: Callable[[str], bool]) -> Iterator[str | Reference]:
    """Part plain text from `embedding:name` references, in order.

    Args:
        text: a segment's text.
        known: whether there is an embedding of that name; decides whether punctuation after a name belongs to it, as
            in "embedding:old, in blue".

    Yields:
        Text that is not empty, and references.
    """
    begin = 0
    for match in _REFERENCE.finditer(text):
        if before := text[begin : match.start()]:
            yield before
        name = match[1]
        if not known(_stem(name)):
            name = name.rstrip(_TRAILING_PUNCTUATION) or name
        yield Reference(_stem(name))
        begin = match.start(1) + len(name)
    if rest := text[begin:]:
        yield rest


def _stem(name: str) -> str:
    return name.removesuffix(".safetensors")


def _pairs(prompt: str) -> dict[int, int]:
    """The partner's place for each bracket that has one, both ways."""
    partners: dict[int, int] = {}
    open_brackets: list[int] = []
    for bracket in _BRACKET.finditer(prompt):
        if bracket[0] == "(":
            open_brackets.append(bracket.start())
        elif bracket[0] == ")" and open_brackets:
            opening = open_brackets.pop()
            partners[opening] = bracket.start()
            partners[bracket.start()] = opening
    return partners


def _group(prompt: str, opening: int, closing: int, *, around: float) -> tuple[float, int]:
    """Weight of a bracketed group, and where its text ends: at the colon of its own weight, or at the bracket."""
    colon = prompt.rfind(":", opening + 2, closing)  # + 2: a number needs text before it
    number = prompt[colon + 1 : closing] if colon >= 0 else ""
    if _NUMBER.fullmatch(number) and math.isfinite(float(number)):
        return _within_bounds(float(number)), colon
    return _within_bounds(around * BRACKET_WEIGHT), closing


def _within_bounds(weight: float) -> float:
    return min(max(weight, -GREATEST_WEIGHT), GREATEST_WEIGHT)
