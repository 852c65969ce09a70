"""Models larger than the device's memory: what of them stays there, what comes and goes, what passes through.

    placed = place(mmdit, stay, mover)     # a finished model, whose weights may be anywhere
    velocity = mmdit(x, context, table)    # as ever: the same bits

Blocks pass through the device as `stream` has it. adaLN is called once a run, before the first step, and for all blocks
in a row, and so are an encoder's layers: where they stream, their slots exist only meanwhile. Token tables of encoders
stay in host memory, and the rows that a prompt asks for are moved.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from octavo.fp8 import Fp8Linear
from octavo.placement.home import Unit
from octavo.placement.movers import Mover
from octavo.placement.sizes import human
from octavo.placement.stream import Held, Streamed, plain_tensors
from octavo.placement.units import units_of

if TYPE_CHECKING:
    from octavo.placement.plan import Stay

MARK = "placed"  # the model's attribute that `placed_on` finds


class Placed:
    """Where a model's weights live; made by `place`.

    Attributes:
        stay: of its blocks.
        modulation_streamed: whether adaLN passes through the device once a run.
        away: whether all its weights are in host memory, until `arrive`.
    """

    def __init__(self, model: nn.Module, stay: "Stay", mover: Mover, *, modulation_streamed: bool = False) -> None:
        units = units_of(model)
        self.stay, self.modulation_streamed = stay, modulation_streamed
        self._mover, self._units = mover, units
        passing = {id(module) for unit in (*units.blocks, *units.modulation) for module in unit.inside()}
        passing |= {id(table) for table in units.tables}
        others = tuple(module for module in model.modules() if id(module) not in passing)
        self._blocks = Streamed(units.blocks, stay, mover, once=units.now_and_then)
        self._modulation = Streamed(units.modulation, self._of_modulation(), mover, once=True)
        with plain_tensors():
            self._rest = Held(Unit("rest", others, alone=True), mover)
            self._rest.settle(keep_home=stay.leaves)
            for layer in model.modules():
                if isinstance(layer, Fp8Linear) and layer.input_scale is not None:
                    layer.input_scale = layer.input_scale.to(mover.device)
        for table in units.tables:
            _look_up_at_home(table, mover.device)
        self.away = False
        model.__dict__[MARK] = self
        self._model = model

    def move(self, stay: "Stay", *, modulation_streamed: bool = False) -> None:
        """Place it anew; not while the model is used."""
        self.stay, self.modulation_streamed = stay, modulation_streamed
        both = [(self._blocks, stay), (self._modulation, self._of_modulation())]
        for streamed, its in sorted(both, key=lambda each: each[1].resident):
            streamed.move(its, away=self.away)

    @property
    def slots(self) -> int:
        """Buffers that there are now."""
        return len(self._blocks.slots) + len(self._modulation.slots)

    def rest(self) -> None:
        """Give back the buffers that units pass through; the next call makes them anew."""
        self._blocks.rest()
        self._modulation.rest()

    def leave(self) -> None:
        """Take all weights off the device; `arrive` before the next use."""
        if self.away:
            return
        self._blocks.leave()
        self._modulation.leave()
        with plain_tensors():
            self._rest.go_home()
        self.away = True

    def arrive(self) -> None:
        """Bring back what `leave` has taken away; free where there is nothing to bring."""
        if self.away:
            self._blocks.arrive()
            self._modulation.arrive()
            with plain_tensors():
                self._rest.settle(keep_home=self.stay.leaves)
            self.away = False

    def close(self) -> None:
        """Let go of the model, which is not used any more, so that its memory is free as soon as nobody has it."""
        self._blocks.close()
        self._modulation.close()
        self._mover.finish()
        self._model.__dict__.pop(MARK, None)

    @property
    def streamed(self) -> bool:
        """Whether tensors change their addresses while the model is used."""
        return bool(self._blocks.streamed)

    @property
    def device_bytes(self) -> int:
        """What its weights take on the device at most, adaLN aside where that passes."""
        return (
            self._blocks.device_bytes
            + self._rest.nbytes
            + (0 if self.modulation_streamed else self._modulation.device_bytes)
        )

    @property
    def host_bytes(self) -> int:
        """What they take in host memory."""
        tables = sum(table.weight.nbytes for table in self._units.tables)
        return self._blocks.host_bytes + self._modulation.host_bytes + tables

    def __str__(self) -> str:
        stay = self.stay
        said = f"all {stay.layers} blocks resident" if stay.layers else "whole"
        if stay.resident < stay.layers:
            through = f"{stay.slots} buffers of {human(self._blocks.slot_bytes)}"
            passing = stay.layers - stay.resident
            said = f"{stay.resident} of {stay.layers} blocks resident, {passing} pass through {through}"
        once = "; adaLN passes once a run" if self.modulation_streamed and self._units.modulation else ""
        return f"{said}{once}; {human(self.device_bytes)} on the device, {human(self.host_bytes)} in host memory"

    def _of_modulation(self) -> "Stay":
        from octavo.placement.plan import Stay

        count = len(self._units.modulation)
        return Stay(resident=0 if self.modulation_streamed else count, layers=count)


def place(model: nn.Module, stay: "Stay", mover: Mover, *, modulation_streamed: bool = False) -> Placed:
    """Let a finished model's weights live where a plan says; what it computes stays the same, bit for bit.

    Args:
        model: loaded and prepared; its weights may be in host memory or on the device.
        stay: of its blocks or layers.
        mover: knows the device.
        modulation_streamed: let adaLN pass through the device once a run.
    """
    return Placed(model, stay, mover, modulation_streamed=modulation_streamed)


def placed_on(model: nn.Module) -> Placed | None:
    """What `place` made of the model; None for one that was not placed."""
    return model.__dict__.get(MARK)


def _look_up_at_home(table: nn.Embedding, device: torch.device) -> None:
    """Let a table of tokens stay in host memory: the tokens go there, their rows come back."""
    table.weight = nn.Parameter(table.weight.detach().cpu(), requires_grad=False)
    table.register_forward_pre_hook(lambda table, inputs: (inputs[0].to(table.weight.device),))
    table.register_forward_hook(lambda _table, _inputs, rows: rows.to(device))
