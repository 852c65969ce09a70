"""Work that is tried again with less where memory does not suffice."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from octavo.devices import out_of_memory, trim_memory
from octavo.errors import OutOfMemoryError

logger = logging.getLogger(__name__)

T = TypeVar("T")

Smaller = Callable[[], bool]
"""Gives memory up, such as by going over to a smaller plan; whether there was any to give."""


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


def nothing_to_give() -> bool:
    """The `Smaller` of those whose memory nobody plans."""
    return False


def sparing(work: Callable[[], T], smaller: Smaller, what: str) -> T:
    """What `work` gives, tried again after each time that something was given up for it.

    Args:
        work: may be done again from its beginning.
        smaller: gives memory up.
        what: for the message.

    Raises:
        OutOfMemoryError: nothing is left to give up.
    """
    while True:
        done = attempt(work)
        if not isinstance(done, Short):
            return done
        logger.warning("Memory does not suffice for %s (%s).", what, done.said)
        if not smaller():
            raise done.error(what)
