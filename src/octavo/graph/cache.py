"""Results of nodes, kept by what made them, so that what comes again is not done again.

A result's key is the signature of its node: class, values, and the signatures of the nodes it is linked to. Runs of
many threads share one cache. Two that need the same result at once do the work once: one computes, the other waits.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

SMALL = 256  # bytes that a result counts at least
DEEPEST = 12  # levels of a result that are looked into for its size
NAP = 0.05  # seconds between looks whether one who waits was cancelled


@dataclass(frozen=True, slots=True)
class Result:
    """What a node gave."""

    outputs: tuple[list[Any], ...]  # for each output its items, one unless it is a list
    ui: Mapping[str, list[Any]] | None = None  # what there is to show; None of a node that shows nothing
    size: int = field(default=0, compare=False)  # bytes


class Cache:
    """The most recently used results within bounds.

    Args:
        max_bytes: of all that results hold (tensors and pictures; models count nothing, they are kept elsewhere).
        max_entries: results.
    """

    def __init__(self, *, max_bytes: int = 512 << 20, max_entries: int = 2000) -> None:
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self._lock = threading.Condition()
        self._results: OrderedDict[str, Result] = OrderedDict()
        self._at_work: set[str] = set()
        self._bytes = 0

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._results

    def __len__(self) -> int:
        with self._lock:
            return len(self._results)

    @property
    def bytes(self) -> int:
        """What the results hold together."""
        with self._lock:
            return self._bytes

    def get(self, key: str) -> Result | None:
        """A kept result, which is now the most recently used."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
            return self._results.get(key)

    def put(self, key: str, result: Result) -> None:
        """Keep a result, unless it alone is beyond the bounds; the least recently used leave until all is within."""
        size = size_of((result.outputs, result.ui))
        with self._lock:
            self._drop(key)
            if size > self.max_bytes:
                return
            self._results[key] = Result(result.outputs, result.ui, size)
            self._bytes += size
            while self._bytes > self.max_bytes or len(self._results) > self.max_entries:
                self._drop(next(iter(self._results)))

    def drop(self, key: str) -> None:
        """Forget a result."""
        with self._lock:
            self._drop(key)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._results.clear()
            self._bytes = 0

    def compute(self, key: str, work: Callable[[], Result], check: Callable[[], None]) -> Result:
        """The kept result, or that of `work`; of several threads that ask at once one works and the others wait.

        Where the one that works fails, another takes over.

        Args:
            check: called while waiting; what it raises ends the wait.
        """
        while True:
            with self._lock:
                if (known := self.get(key)) is not None:
                    return known
                if key not in self._at_work:
                    self._at_work.add(key)
                    break
                self._lock.wait(NAP)
            check()
        with self._working(key):
            result = work()
            self.put(key, result)
            return result

    @contextmanager
    def _working(self, key: str) -> Iterator[None]:
        try:
            yield
        finally:
            with self._lock:
                self._at_work.discard(key)
                self._lock.notify_all()

    def _drop(self, key: str) -> None:
        old = self._results.pop(key, None)
        if old is not None:
            self._bytes -= old.size


def size_of(value: Any, depth: int = 0) -> int:
    """Bytes of what `value` holds: of everything that says its `nbytes`, and of texts, however they are packed."""
    if depth > DEEPEST:
        return 0
    if callable(value):  # a model, which belongs to the shelf
        return SMALL
    size = getattr(value, "nbytes", None)
    if isinstance(size, int):
        return size
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return SMALL + sum(size_of(each, depth + 1) for each in value.values())
    if isinstance(value, list | tuple):
        return SMALL + sum(size_of(each, depth + 1) for each in value)
    # Plain carriers of data are looked into.
    if is_dataclass(value):
        return SMALL + sum(size_of(getattr(value, each.name, None), depth + 1) for each in fields(value))
    return SMALL
