"""Does a picture show the words that its prompt asks for? By a reader of text in pictures, RapidOCR on ONNX.

Its models come inside its package, so that it works offline. The embedded model's words are read by the checker.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from octavo.errors import MissingExtraError


class TextReader(Protocol):
    """What reads text in pictures."""

    name: str  # for the report

    def __call__(self, image: Image.Image) -> str:
        """All text of a picture, in any order."""
        ...


class RapidReader:
    """RapidOCR, PP-OCRv4.

    Raises:
        MissingExtraError: it is not installed.
    """

    name = "RapidOCR (PP-OCRv4)"

    def __init__(self) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as missing:
            raise MissingExtraError(
                f"The reader of text in pictures cannot be imported ({missing}); run: pip install 'octavo[eval]' "
                "(Python 3.11 or 3.12), or pass --no-ocr to leave the typography score out."
            ) from missing
        self._read: Any = RapidOCR()

    def __call__(self, image: Image.Image) -> str:
        # It expects OpenCV's order of channels.
        found, _seconds = self._read(np.asarray(image.convert("RGB"))[:, :, ::-1])
        return " ".join(text for _box, text, _score in found or ())


def share_read(words: Sequence[str], text: str) -> float:
    """Share of `words` that occur in `text`, in any case; words that were read as one count too.

    Args:
        words: at least one, letters and digits only.
        text: what a reader found.
    """
    seen = re.sub(r"[\W_]+", " ", text).upper()
    whole = set(seen.split())
    joined = seen.replace(" ", "")
    # Readers run words of a line together. A word of one or two letters would be found in any text that way.
    found = [word in whole or (len(word) > 2 and word in joined) for word in (w.upper() for w in words)]
    return sum(found) / len(found)
