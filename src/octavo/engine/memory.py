"""What is tried when memory does not suffice, one rung after the other.

A turn of the batch: half as many questions, and so on down to one. One question: its rows one by one, then all that it
does not need leaves memory. Other work, such as decoding, which goes over to tiles by itself: all that can be loaded
again leaves memory, then once more. What still does not fit fails alone.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from octavo.devices import out_of_memory, trim_memory
from octavo.errors import OutOfMemoryError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Short:
    """In place of a result: memory did not suffice.

    Not the exception itself, for its traceback would keep alive the tensors that fill the memory.
    """

    def __init__(self, said: str) -> None:
        self.said = said.splitlines()[0] if said else "no memory"

    def error(self, what: str) -> OutOfMemoryError:
        """For the user, of work that has come to its last rung."""
        return OutOfMemoryError(
            f"Memory does not suffice for {what}, although all that it does not need was given up ({self.said}). "
            "Ask for a smaller picture or a smaller batch, or use a smaller model, FP8 weights or --tiled-vae."
        )


def attempt(work: Callable[[], T]) -> T | Short:
    """What `work` gives, or `Short` where memory does not suffice; by then its tensors are gone."""
    try:
        return work()
    except Exception as error:
        if not out_of_memory(error):
            raise
        short = Short(str(error))
    collect()
    return short


def collect() -> None:
    """Give what is no longer used back to the device and the system."""
    gc.collect()  # an exception and its frames hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_memory()


def first_that_fits(ways: Sequence[Callable[[], T]], what: str) -> T:
    """What the first of the ways gives for which memory suffices.

    Args:
        ways: to do the same, the sparing ones last.
        what: for the message.

    Raises:
        OutOfMemoryError: it suffices for none of them.
    """
    short = Short("")
    for way in ways:
        done = attempt(way)
        if not isinstance(done, Short):
            return done
        short = done
        logger.warning("Memory does not suffice for %s (%s).", what, short.said)
    raise short.error(what)
