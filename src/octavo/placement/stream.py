"""Blocks whose weights live at home in host memory and pass through the device.

Of the blocks that stream, one computes from its slot, a buffer on the device, while the next one is copied into
another: after the last block comes the first of the next step. Hooks point a block's tensors at the slot for the time
of its forward, and home again afterwards. The order in which blocks are called is only what is expected: one that comes
out of turn, after blocks that were skipped or a step that was broken off, is fetched when it comes.

Which blocks of a model stream, and what becomes of the rest of it, is for `placed`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from octavo.devices import trim_memory
from octavo.placement.home import Layout, Pointing, Unit, point
from octavo.placement.movers import Mark, Mover

if TYPE_CHECKING:
    from octavo.placement.plan import Stay

TRIM_AFTER = 1 << 30  # bytes that went home, after which what they left is given back to the system


class Held:
    """A unit and its bytes: at home, on the device, or, while that is being changed, both."""

    def __init__(self, unit: Unit, mover: Mover) -> None:
        self.unit, self._mover = unit, mover
        self.layout = Layout(unit)
        self.home: Tensor | None = None
        self._own: Tensor | None = None  # on the device, while it is resident
        self.at_home: Pointing = ()

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def go_home(self) -> None:
        """Into host memory, and nowhere else."""
        if self.home is None:
            home = self._mover.host(self.nbytes)
            self.layout.gather(home)
            self._mover.pin(home)
            self.home, self.at_home = home, self.layout.pointing(home)
        point(self.at_home)
        self._own = None

    def settle(self, *, keep_home: bool) -> None:
        """Onto the device, until further notice."""
        if self.home is None and all(map(self._mover.holds, self.unit.tensors())):
            return
        if self._own is None:
            own = self._mover.buffer(self.nbytes)
            if self.home is None:
                self.layout.gather(own)
            else:
                self._mover.wait(self._mover.copy(self.home, own, self._mover.mark()))
            point(self.layout.pointing(own))
            self._own = own
        if self.home is not None and not keep_home:
            self._mover.finish()  # the copy reads it
            self.home, self.at_home = None, ()


@dataclass(slots=True, eq=False)
class _Slot:
    """A buffer on the device that units take turns in."""

    buffer: Tensor
    free: Mark  # when what was computed from it has read it
    unit: int | None = None  # whose bytes are in it or on their way
    arrived: Mark = None


class Streamed:
    """Units of a finished model, some resident, the others passing through slots. May be called from any thread.

    Attributes:
        stay: how many are resident, how many slots there are.
        streamed: indexes of the units that pass.
    """

    def __init__(self, units: Sequence[Unit], stay: "Stay", mover: Mover, *, once: bool = False) -> None:
        """Take over the units' weights, wherever they are now.

        Args:
            units: in the order in which they are called.
            stay: of as many layers as there are units.
            mover: knows the device.
            once: they are called in a row now and then, each for as many inputs as the one before it, rather than
                again and again: slots exist only meanwhile.
        """
        self._mover, self._once = mover, once
        with plain_tensors():
            self._held = [Held(unit, mover) for unit in units]
        self._hooks: list[Any] = []
        self.slots: list[_Slot] = []
        self._views: dict[tuple[int, int], Pointing] = {}  # by slot and unit
        self._lock, self._holder, self._inside = Lock(), -1, -1
        self._calls, self._before = (-1, 0), 0  # the unit called last with its calls in a row, and those of the former
        self.move(stay)

    def move(self, stay: "Stay", *, away: bool = False) -> None:
        """Let more or fewer units be resident from now on; not while the model is used.

        Args:
            away: bring none to the device until `arrive`.
        """
        assert stay.layers == len(self._held), f"{stay.layers} layers in the plan, {len(self._held)} in the model"
        for hook in self._hooks:
            hook.remove()
        self.rest()
        self.stay, resident = stay, set(stay.resident_units)
        self.streamed = [i for i in range(len(self._held)) if i not in resident]
        with plain_tensors():
            moved = 0
            for i in self.streamed:  # first, for they make room
                self._held[i].go_home()
                moved += self._held[i].nbytes
                if moved >= TRIM_AFTER:
                    trim_memory()
                    moved = 0
            for i in resident:
                if away:
                    self._held[i].go_home()
                else:
                    self._held[i].settle(keep_home=stay.leaves)
        self._next = dict(pairwise([*self.streamed, *self.streamed[:1]]))
        self._hooks = [
            hook
            for i in self.streamed
            for module in self._held[i].unit.modules
            for hook in (
                module.register_forward_pre_hook(self._entering(i)),
                module.register_forward_hook(self._left(i), always_call=True),
            )
        ]

    def rest(self) -> None:
        """Give the slots' memory back until the next call."""
        for slot in self.slots:
            if slot.arrived is not None:
                # The memory may be computed with at once: not before the last copy into it.
                self._mover.wait(slot.arrived)
        self.slots, self._views = [], {}

    def leave(self) -> None:
        """Take everything off the device, until `arrive`."""
        self.rest()
        with plain_tensors():
            for i in self.stay.resident_units:
                self._held[i].go_home()

    def arrive(self) -> None:
        """Bring back what is resident."""
        with plain_tensors():
            for i in self.stay.resident_units:
                self._held[i].settle(keep_home=self.stay.leaves)

    def close(self) -> None:
        """Take the hooks off, and give the slots back."""
        for hook in self._hooks:
            hook.remove()
        self.rest()

    @property
    def slot_bytes(self) -> int:
        """Of one slot: the largest of the units that pass."""
        return max((self._held[i].nbytes for i in self.streamed), default=0)

    @property
    def device_bytes(self) -> int:
        """What the units take on the device while they are used."""
        slots = min(self.stay.slots, len(self.streamed)) * self.slot_bytes
        return slots + sum(self._held[i].nbytes for i in self.stay.resident_units)

    @property
    def host_bytes(self) -> int:
        """What they take in host memory."""
        return sum(self._held[i].nbytes for i in self.streamed)

    # While a unit computes

    def _entering(self, i: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, _inputs: self._enter(i)

    def _left(self, i: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _module, _inputs, _output: self._leave(i)

    def _enter(self, i: int) -> None:
        if self._holder == get_ident():  # a forward was broken off by something that no hook hears of
            self._leave(self._inside)
        self._lock.acquire()  # until the unit is left: another thread could take its slot away
        self._holder, self._inside = get_ident(), i
        try:
            with plain_tensors():
                if not self.slots:
                    self._open()
                slot = self._slot_of(i)
                if slot is None:
                    slot = self._fetch(i, ())
                self._mover.wait(slot.arrived)
                self._point(i, slot)
                self._prefetch(i)
        except BaseException:
            self._inside = -1
            self._let_go()
            raise

    def _leave(self, i: int) -> None:
        if self._holder != get_ident() or self._inside != i:  # it never came in
            return
        try:
            point(self._held[i].at_home)
            slot = self._slot_of(i)
            if slot is not None:
                slot.free = self._mover.mark()
            self._inside = -1
            if self._once and self._over(i):
                self.rest()
        finally:
            self._let_go()

    def _over(self, i: int) -> bool:
        """Whether unit `i`, left now, ends the row: it is the last, and has served all inputs."""
        last, calls = self._calls
        if i == last:
            self._calls = (i, calls + 1)
        else:
            self._calls, self._before = (i, 1), calls
        return i == self.streamed[-1] and self._calls[1] >= self._before

    def _let_go(self) -> None:
        self._holder = -1
        self._lock.release()

    def _open(self) -> None:
        count = min(self.stay.slots, len(self.streamed))
        buffers = [self._mover.buffer(self.slot_bytes) for _ in range(count)]
        self.slots = [_Slot(buffer, self._mover.mark()) for buffer in buffers]

    def _slot_of(self, i: int) -> _Slot | None:
        return next((slot for slot in self.slots if slot.unit == i), None)

    def _fetch(self, i: int, wanted: Sequence[int]) -> _Slot:
        """Copy a unit into the slot whose unit is needed last, of those that hold none of the `wanted`."""
        home = self._held[i].home
        assert home is not None, "a unit that streams has a home"
        slot = max((slot for slot in self.slots if slot.unit not in wanted), key=lambda slot: self._distance(i, slot))
        slot.unit = None  # should the copy fail
        slot.arrived = self._mover.copy(home, slot.buffer, slot.free)
        slot.unit = i
        return slot

    def _distance(self, i: int, slot: _Slot) -> int:
        """How many units come before that of the slot is called again, when `i` is called now."""
        count = len(self._held)
        return count if slot.unit is None else (slot.unit - i) % count

    def _prefetch(self, i: int) -> None:
        """Let the units that come next into the other slots."""
        wanted = [i]
        for _ in self.slots[1:]:
            following = self._next[wanted[-1]]
            if following in wanted or (self._once and following < wanted[-1]):
                return
            if self._slot_of(following) is None:
                self._fetch(following, wanted)
            wanted.append(following)

    def _point(self, i: int, slot: _Slot) -> None:
        key = (self.slots.index(slot), i)
        if key not in self._views:
            self._views[key] = self._held[i].layout.pointing(slot.buffer)
        point(self._views[key])


def plain_tensors() -> Any:
    """Buffers outlive the inference mode that they may be made in, and are written to outside of it, too."""
    return torch.inference_mode(False)
