"""Conditioning of texts that were encoded before, the least recently used forgotten first."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from weakref import finalize

from octavo.pipeline.encode import Conditioning, TextEncoders

Key = tuple[int, Hashable]


class TextCache:
    """Least-recently-used conditioning by text and encoders, bounded by bytes. Any thread may use it.

    Attributes:
        limit: bytes that are kept at most; 0 keeps nothing.
        hits, misses: how often a text was there, and was not.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.hits, self.misses = limit, 0, 0
        self._kept: OrderedDict[Key, Conditioning] = OrderedDict()
        self._nbytes = 0
        self._known: set[int] = set()
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return self._nbytes

    def get(self, encoders: TextEncoders, text: Hashable, make: Callable[[], Conditioning]) -> Conditioning:
        """What `make` gave for this text and these encoders before, else gives now.

        Args:
            encoders: those that `make` uses; another object is another key, but for LoRAs on the same ones, which
                count by themselves.
            text: all that the result depends on.
            make: encodes it; called without a lock held.
        """
        text, encoders = (text, encoders.adapters), encoders.plain or encoders
        key = (id(encoders), text)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                self.hits += 1
                return self._kept[key]
            self.misses += 1
        made = make()
        with self._lock:
            if id(encoders) not in self._known:
                # An object that comes later may get the same id.
                self._known.add(id(encoders))
                finalize(encoders, self._forget, id(encoders))
            if key not in self._kept:
                self._kept[key] = made
                self._nbytes += _nbytes(made)
            while self._nbytes > self.limit and self._kept:
                self._nbytes -= _nbytes(self._kept.popitem(last=False)[1])
        return made

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._kept.clear()
            self._nbytes = 0

    def _forget(self, encoders: int) -> None:
        with self._lock:
            self._known.discard(encoders)
            for key in [key for key in self._kept if key[0] == encoders]:
                self._nbytes -= _nbytes(self._kept.pop(key))


def _nbytes(conditioning: Conditioning) -> int:
    return conditioning.context.nbytes + conditioning.pooled.nbytes
