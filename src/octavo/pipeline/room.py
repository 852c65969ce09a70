"""Parts of several models in one memory: who is there, and who leaves when another comes."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from octavo.devices import free_bytes
from octavo.pipeline.components import SPARE, Part
from octavo.pipeline.placing import Budget, Placing, leave_others
from octavo.placement.plan import Stay
from octavo.placement.units import units_of

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)


class Room(Generic[K]):
    """See the module. Any thread may ask; weights move where device work is done.

    Attributes:
        device: whose memory it is.
        budget: how much of it may be used by all together; None for all that is free.
    """

    def __init__(self, device: torch.device, budget: Budget | None = None) -> None:
        self.device, self.budget = device, budget
        self._parts: OrderedDict[K, Part[nn.Module]] = OrderedDict()
        self._placings: list[Placing] = []
        self._lock = Lock()  # never held while a part is asked to do anything, for parts have locks of their own

    def find(self, key: K) -> Part[nn.Module] | None:
        """The part of this key, if it was added."""
        with self._lock:
            return self._parts.get(key)

    def add(self, key: K, part: Part[nn.Module], before_loading: Callable[[], None]) -> None:
        """Let a part live here.

        Args:
            before_loading: told when its weights are to be read.
        """

        def load() -> None:
            before_loading()
            self.make(part)

        def use() -> None:
            with self._lock:
                self._parts.move_to_end(key)

        with self._lock:
            self._parts[key] = part
        part.before_loading, part.when_used = load, use

    def follow(self, placing: Placing, parts: Sequence[Part[Any]]) -> None:
        """Note a plan; its parts share the device with those of other models."""
        self._placings.append(placing)
        for part in parts:
            part.when_arriving = self._arriving

    def lone(self, part: Part[nn.Module]) -> Part[nn.Module]:
        """A part that no plan has: where the user has named a budget, it comes for its work, streamed, and leaves."""
        if self.budget is not None and self.budget.named and part.stay is None:
            part.place(Stay(resident=0, layers=len(units_of(part.skeleton).blocks), leaves=True))
            part.when_arriving = self._arriving
        return part

    @property
    def loaded(self) -> list[Part[nn.Module]]:
        """Parts whose weights are in memory, the one used longest ago first."""
        with self._lock:
            parts = list(self._parts.values())
        return [part for part in parts if part.loaded]

    def free(self, *keep: Part[nn.Module]) -> int:
        """Have all parts but those to keep leave; returns how many bytes of weights these were."""
        gone = [part for part in self.loaded if not any(part is kept for kept in keep)]
        for part in gone:
            self._give_way(part)
        return sum(part.nbytes for part in gone)

    def smaller(self) -> bool:
        """Go over to a smaller memory plan, of a model that is in use; whether there was one."""
        return any(placing.smaller() for placing in self._placings if placing.mmdit.loaded)

    def make(self, wanted: Part[nn.Module]) -> None:
        """Have parts leave until `wanted` fits, those used longest ago first."""
        # Where the user has named a budget, plans have counted what the work takes.
        spare = 0 if self.budget is not None and self.budget.named else SPARE
        for part in self.loaded:
            free = self._free_bytes()
            if free is None or wanted.needs + spare <= free:
                return
            if part is not wanted and not part.away:
                logger.info("%s (%s) leaves memory to make room for %s.", part.title, part.path.name, wanted.title)
                self._give_way(part)

    def _free_bytes(self) -> int | None:
        """What a part could take on the device now."""
        free = free_bytes(self.device)
        if self.budget is None or not self.budget.named or free is None:
            return free
        if self.device.type == "cuda":
            used = torch.cuda.memory_allocated(self.device)
        else:
            used = sum(part.needs for part in self.loaded if not part.away)
        return min(free, self.budget.nbytes - used)

    def _give_way(self, part: Part[nn.Module]) -> None:
        """Into the host's memory if its home is there, and that is not what is short; else out of all memory."""
        if self.device.type == "cuda" and part.stay is not None and part.stay.leaves:
            part.leave()
        else:
            part.release()

    def _arriving(self, part: Part[nn.Module]) -> None:
        leave_others(part, self.loaded)
