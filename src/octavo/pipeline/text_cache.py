"""Conditioning of texts that were encoded before, the least recently used forgotten first."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from threading import Lock
from typing import TypeVar
from weakref import finalize

from octavo.pipeline.encode import Conditioning, TextEncoders

T = TypeVar("T", bound=Hashable)
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

    def get(
        self, encoders: TextEncoders, texts: Sequence[T], make: Callable[[Sequence[T]], Sequence[Conditioning]]
    ) -> list[Conditioning]:
        """What `make` gave for each text and these encoders before, else gives now.

        Args:
            encoders: those that `make` uses; another object is another key, but for LoRAs on the same ones, which
                count by themselves.
            texts: of each, all that the result depends on.
            make: encodes those that are missing, each once; called without a lock held.
        """
        adapters, encoders = encoders.adapters, encoders.plain or encoders
        keys: dict[T, Key] = {text: (id(encoders), (text, adapters)) for text in texts}
        found: dict[T, Conditioning] = {}
        with self._lock:
            for text, key in keys.items():
                if key in self._kept:
                    self._kept.move_to_end(key)
                    found[text] = self._kept[key]
            missing = [text for text in keys if text not in found]
            self.misses += len(missing)
            self.hits += len(texts) - len(missing)
        if missing:
            made = dict(zip(missing, make(missing), strict=True))
            with self._lock:
                self._keep(encoders, {keys[text]: each for text, each in made.items()})
            found |= made
        return [found[text] for text in texts]

    def _keep(self, encoders: TextEncoders, made: Mapping[Key, Conditioning]) -> None:
        if id(encoders) not in self._known:
            # An object that comes later may get the same id.
            self._known.add(id(encoders))
            finalize(encoders, self._forget, id(encoders))
        for key, each in made.items():
            if key not in self._kept:
                self._kept[key] = each
                self._nbytes += _nbytes(each)
        while self._nbytes > self.limit and self._kept:
            self._nbytes -= _nbytes(self._kept.popitem(last=False)[1])

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
