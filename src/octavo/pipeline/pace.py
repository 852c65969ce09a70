"""What is nice to have, such as previews, kept to a small share of the time."""

from collections.abc import Callable
from threading import Lock
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")

SHARE = 0.1


class Pace:
    """Does a thing that is wanted again and again only as often as its cost allows. Any thread may ask.

    Many jobs that are each shown as they come along would otherwise take more of the machine than the drawing.
    """

    def __init__(self, share: float = SHARE) -> None:
        """`share` is the most of the time that it may take."""
        self.share = share
        self._lock = Lock()
        self._next = 0.0

    def __call__(self, work: Callable[[], T]) -> T | None:
        """What `work` gives; None, and nothing done, where the last time was too costly to be followed already."""
        # Whoever comes while another is at it goes away rather than waits.
        if perf_counter() < self._next or not self._lock.acquire(blocking=False):
            return None
        try:
            start = perf_counter()
            result = work()
            end = perf_counter()
            self._next = end + (end - start) * (1 / self.share - 1)
            return result
        finally:
            self._lock.release()
