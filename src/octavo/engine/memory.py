"""What is tried when memory does not suffice, one rung after the other.

A turn of the batch: half as many questions, and so on down to one. One question: its rows one by one, then all that it
does not need leaves memory. Other work, such as encoding and decoding: all that can be loaded again leaves memory, then
once more. Then, for either, the next smaller memory plan, and the next (`pipeline.placing`). What still does not fit
fails alone.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from octavo.pipeline.sparing import Short, Smaller, attempt, nothing_to_give, sparing

logger = logging.getLogger(__name__)

T = TypeVar("T")


def first_that_fits(ways: Sequence[Callable[[], T]], what: str, smaller: Smaller = nothing_to_give) -> T:
    """What the first of the ways gives for which memory suffices.

    Args:
        ways: to do the same, the sparing ones last.
        what: for the message.
        smaller: asked for memory before the last way is tried again, as long as it gives any.

    Raises:
        OutOfMemoryError: it suffices for none of them.
    """
    for way in ways[:-1]:
        done = attempt(way)
        if not isinstance(done, Short):
            return done
        logger.warning("Memory does not suffice for %s (%s).", what, done.said)
    return sparing(ways[-1], smaller, what)
