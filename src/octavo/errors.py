"""Every error that Octavo raises on purpose.

The tree::

    OctavoError                     show its text to the user; exit code 2
    ├── RequestError                what was asked cannot be done: a size, a sampler name, a setting
    │   └── RecipeError             a recipe for quantizing that cannot be read: an unknown key, a value out of range
    ├── ModelNotFoundError          no file of that name, or none at all: what to download and where to put it
    ├── CheckpointError             a file cannot be used, with file, key, expectation and remedy
    │   ├── CorruptFileError        truncated, bad header, lying offsets, NaN weights
    │   ├── WrongModelError         a sound file of another kind: a LoRA given as a model, an unknown architecture
    │   └── UnsupportedFormatError  a number format that we do not read (nvfp4, mxfp8, pickle)
    ├── DownloadError               the hub could not be reached, refused, or the disk is full
    ├── NumericsError               NaN or infinity where a picture should have been; names the layer
    ├── GateError                   a quantized model draws too far from the original to be kept
    └── MissingExtraError           an optional package is not installed; says what to install

An error's text says what happened, what was expected and what to do.
"""

import difflib
from collections.abc import Iterable


class OctavoError(Exception):
    """Base of all; its text is meant for the user."""


class RequestError(OctavoError):
    """What was asked cannot be done."""


class RecipeError(RequestError):
    """A recipe for quantizing says what no recipe can."""


class ModelNotFoundError(OctavoError):
    """No such model file."""


class CheckpointError(OctavoError):
    """A file cannot be used as it is."""


class CorruptFileError(CheckpointError):
    """A file is damaged or lies about itself."""


class WrongModelError(CheckpointError):
    """A sound file, but not of the kind needed here."""


class UnsupportedFormatError(CheckpointError):
    """A number or file format that Octavo does not read."""


class DownloadError(OctavoError):
    """A download could not be finished."""


class NumericsError(OctavoError):
    """NaN or infinity appeared in the computation."""


class GateError(OctavoError):
    """A quantized model's pictures are too far from the 16-bit model's."""


class MissingExtraError(OctavoError):
    """An optional package is not installed."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`" Did you mean 'euler'?"`, or nothing where no known name is close; for the end of an error's sentence."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
