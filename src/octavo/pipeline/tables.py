"""Modulation tables that outlive a run, so that a prompt which comes again is not computed again.

What is kept together is what was made in one call of the model: all levels of one run for one prompt. A product's
rounding depends on how many rows it has, so rows made in other company may differ in their last bits; a run that finds
its table here has the very bits that it would have computed.
"""

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.fp8 import at_sigmas
from octavo.models import ControlNet, MMDiT, Modulation
from octavo.models.adapter import Applied, adapted
from octavo.sampling.flow import timestep

MAX_BYTES = 512 << 20  # four runs of SD3.5 Large in bfloat16: 28 steps of one prompt are 63 MB


def make_table(
    mmdit: MMDiT | ControlNet, pooled: Tensor, sigmas: Sequence[float], adapters: Applied = ()
) -> Modulation:
    """The modulation of one prompt at every level, in one call.

    Args:
        mmdit: or a ControlNet, which has tables of its own.
        pooled: [1, pooled width], on the model's device, in its dtype.
        sigmas: N levels.
        adapters: that act on the model meanwhile.

    Returns:
        N rows.
    """
    return make_each(mmdit, [pooled], sigmas, adapters)[0]


def make_each(
    mmdit: MMDiT | ControlNet, prompts: Sequence[Tensor], sigmas: Sequence[float], adapters: Applied = ()
) -> list[Modulation]:
    """`make_table` of several prompts, the same bits; weights that pass through a device do so once for all."""
    levels = [timestep(sigma) for sigma in sigmas]
    asked = [
        (torch.tensor(levels, dtype=torch.float32, device=pooled.device), pooled.expand(len(sigmas), -1))
        for pooled in prompts
    ]
    with at_sigmas(mmdit, sigmas), adapted(mmdit, adapters):
        return mmdit.modulations(asked)


class Tables:
    """Tables by model, adapters, prompt and levels; the least recently used leave when they are too many bytes.

    Only for models whose weights stay as they are: after a change, `forget` them. Any thread may use it.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self.hits = self.misses = 0
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._lock = threading.RLock()  # again by the same thread, where a model's end is noticed in between

    def __len__(self) -> int:
        return len(self._entries)

    def get(
        self, mmdit: MMDiT | ControlNet, pooled: Tensor, sigmas: Sequence[float], adapters: Applied = ()
    ) -> Modulation:
        """`make_table`, unless it is here."""
        return self.get_each(mmdit, [pooled], sigmas, adapters)[0]

    def get_each(
        self, mmdit: MMDiT | ControlNet, prompts: Sequence[Tensor], sigmas: Sequence[float], adapters: Applied = ()
    ) -> list[Modulation]:
        """`make_each` of those that are not here, and the others."""
        keys, found = [], dict[_Key, Modulation]()
        for pooled in prompts:
            bits = pooled.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
            digest = hashlib.blake2b(bits).digest()
            keys.append(_Key(id(mmdit), digest, pooled.dtype, pooled.device, tuple(sigmas), adapters))
        with self._lock:
            for key in keys:
                entry = self._entries.get(key)
                if entry is None:
                    self.misses += 1
                    continue
                self._entries.move_to_end(key)
                self.hits += 1
                found[key] = entry.table
        missing = {key: pooled for key, pooled in zip(keys, prompts, strict=True) if key not in found}
        if missing:
            made = make_each(mmdit, list(missing.values()), sigmas, adapters)
            for key, table in zip(missing, made, strict=True):
                found[key] = table
                self._keep(mmdit, key, table)
        return [found[key] for key in keys]

    def _keep(self, mmdit: MMDiT | ControlNet, key: "_Key", table: Modulation) -> None:
        nbytes = table.flat.nbytes
        if nbytes <= self.max_bytes:
            with self._lock:
                gone = weakref.ref(mmdit, lambda _: self._drop(key))
                self._drop(key)  # where another thread made it meanwhile
                self._entries[key] = _Entry(table, nbytes, gone)
                self.nbytes += nbytes
                while self.nbytes > self.max_bytes:
                    self._drop(next(iter(self._entries)))

    def forget(self, mmdit: MMDiT | ControlNet) -> None:
        """Drop all tables of a model, whose weights or arithmetic are not what they were."""
        with self._lock:
            for key in [key for key in self._entries if key.model == id(mmdit)]:
                self._drop(key)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def _drop(self, key: "_Key") -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.nbytes -= entry.nbytes


class _Key(NamedTuple):
    model: int  # the object's id, which is its own as long as the entry lives
    prompt: bytes  # digest of pooled
    dtype: torch.dtype
    device: torch.device
    sigmas: tuple[float, ...]
    adapters: Applied  # by identity; kept as long as the entry


class _Entry(NamedTuple):
    table: Modulation
    nbytes: int
    gone: "weakref.ref[MMDiT | ControlNet]"  # drops the entry with its model
