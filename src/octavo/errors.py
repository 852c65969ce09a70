"""Every error that Octavo raises on purpose.

The tree::

    OctavoError                     show its text to the user; exit code 2
    ├── RequestError                what was asked cannot be done: a size, a sampler name, a setting
    │   ├── InvalidPrompt           a workflow that cannot be run, with ComfyUI's answer; in graph.workflow
    │   ├── RecipeError             a recipe for quantizing that cannot be read: an unknown key, a value out of range
    │   └── ConflictError           an id or idempotency key of the queue that stands for something else already
    ├── ModelNotFoundError          no file of that name, or none at all: what to download and where to put it
    ├── CheckpointError             a file cannot be used, with file, key, expectation and remedy
    │   ├── CorruptFileError        truncated, bad header, lying offsets, NaN weights
    │   ├── WrongModelError         a sound file of another kind: a LoRA given as a model, an unknown architecture
    │   └── UnsupportedFormatError  a number format that we do not read (nvfp4, mxfp8, pickle)
    ├── DownloadError               the hub could not be reached, refused, or the disk is full
    ├── NumericsError               NaN or infinity where a picture should have been; names the layer
    ├── PlacementError              no way to place a model meets the bytes that may be used; says the least that do
    ├── OutOfMemoryError            the device's memory does not suffice, whatever was given up for it
    ├── GateError                   a quantized model draws too far from the original to be kept
    ├── QueueError                  the queue of requests cannot be used
    │   ├── QueueFullError          as many requests wait as may; says when to try again
    │   ├── QueueBusyError          another process has the queue's file open; says which
    │   └── QueueFileError          the queue's file is damaged, foreign, or cannot be written
    ├── JobError                    a queued request ended early; carries what it had by then
    │   ├── JobCancelledError       someone cancelled it
    │   ├── DeadlineExceededError   its time is up
    │   ├── NodeFailedError         a node of a workflow failed; in graph.execute
    │   └── ShutdownError           the server stops; the request goes back to the queue
    └── MissingExtraError           an optional package is not installed; says what to install

An error's text says what happened, what was expected and what to do.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class OctavoError(Exception):
    """Base of all; its text is meant for the user."""


class RequestError(OctavoError):
    """What was asked cannot be done."""


class RecipeError(RequestError):
    """A recipe for quantizing says what no recipe can."""


class ConflictError(RequestError):
    """A name given to a request belongs to another request."""


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


class PlacementError(OctavoError):
    """No way to place a model's weights meets the bytes that may be used.

    Attributes:
        least: bytes that would do.
    """

    def __init__(self, text: str, *, least: int) -> None:
        super().__init__(text)
        self.least = least


class OutOfMemoryError(OctavoError):
    """The device's memory does not suffice for what was asked."""


class GateError(OctavoError):
    """A quantized model's pictures are too far from the 16-bit model's."""


class QueueError(OctavoError):
    """The queue of requests cannot be used."""


class QueueFullError(QueueError):
    """No more requests are taken at present.

    Attributes:
        retry_after: seconds after which a place is likely to be free.
    """

    def __init__(self, text: str, *, retry_after: int) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class QueueBusyError(QueueError):
    """Another process has the queue's file."""


class QueueFileError(QueueError):
    """The queue's file cannot be read or written."""


class JobError(OctavoError):
    """A queued request ended before it was finished.

    Attributes:
        details: plain data about the failure, for those who read JSON.
        result: what it had made by then, plain data; None where there is nothing to show.
    """

    def __init__(self, text: str, *, details: dict[str, Any] | None = None, result: dict[str, Any] | None = None):
        super().__init__(text)
        self.details = details
        self.result = result


class JobCancelledError(JobError):
    """Someone cancelled the request."""


class DeadlineExceededError(JobError):
    """The request's time is up."""


class ShutdownError(JobError):
    """The server stops; the request is run again after its next start."""


class MissingExtraError(OctavoError):
    """An optional package is not installed."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`" Did you mean 'euler'?"`, or nothing where no known name is close; for the end of an error's sentence."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
