"""The parts of a model under one plan for a device's memory: what stays there, what comes and goes, what passes.

    placing = Placing([mmdit, *encoders, vae], Budget(6 * 10**9, named=True))
    placing.fit(work)            # before a job: plan for it, where the plan at hand does not serve it
    placing.done(*encoders)      # after a stage: those leave that the plan lets leave
    placing.smaller()            # memory was short all the same: the next smaller plan

`placement.plan` makes the plans, `placement.stream` carries them out; the pictures are the same bits under each.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.errors import PlacementError, RequestError
from octavo.models import ControlNet, MMDiTConfig
from octavo.placement.cards import budget_here, card_here
from octavo.placement.graphs import drop_beyond
from octavo.placement.plan import Plan, Stay, make_plan
from octavo.placement.shapes import ENCODERS, PartShape, Shapes
from octavo.placement.sizes import human, parse_bytes
from octavo.placement.work import Work

if TYPE_CHECKING:
    from octavo.pipeline.components import Part

logger = logging.getLogger(__name__)

SMALL = Work(width=256, height=256, rows=1, tokens=77, prompts=1)
NUMBERS = ("width", "height", "steps", "rows", "tokens", "prompts")  # of a `Work`


class Placing:
    """See the module.

    Attributes:
        budget: how much of the device's memory may be used.
        plan: that is followed now.
    """

    def __init__(self, parts: "Sequence[Part[nn.Module]]", budget: "Budget", *, work: Work | None = None) -> None:
        """Plan, and tell the parts, loaded or not.

        Raises:
            PlacementError: the user has named the budget, and nothing fits; says the least that would do.
        """
        self.budget = budget
        self._parts: dict[str, Part[nn.Module]] = {part.kind: part for part in parts}
        self._nets: dict[int, Part[ControlNet]] = {}
        self._gone_down = 0  # times that memory was short although the plan fitted
        self._shapes = Shapes.of({kind: part.skeleton for kind, part in self._parts.items()}, parts[0].dtype)
        for part in self._parts.values():
            part.when_arriving = self._arriving
        usual = work or Work()
        try:
            self.plan = self._planned(usual)
        except PlacementError:
            # It may do for smaller pictures than usual: each job is asked for its own.
            self.plan = self._planned(_each(min, usual, SMALL))
        self._follow(self.plan)

    def fit(self, work: Work, nets: "Sequence[Part[ControlNet]]" = ()) -> None:
        """Plan anew if the plan at hand does not serve a job; call it where device work is done.

        Args:
            work: of the job.
            nets: ControlNets that it uses.

        Raises:
            PlacementError: as at birth.
        """
        new = [net for net in nets if id(net) not in self._nets]
        for net in new:
            self._nets[id(net)] = net
            net.when_arriving = self._arriving
        larger = _each(max, work, self.plan.work)
        if new:
            self._shapes = self._with_nets()
        if new or larger != self.plan.work:
            try:
                # For what came before, too, so that pictures of many sizes do not have weights moved to and fro.
                self.plan = self._planned(larger)
            except PlacementError:
                self.plan = self._planned(work)
        self._follow(self.plan)

    def done(self, *parts: "Part[nn.Module]") -> None:
        """These are not needed until they are called again: they leave the device, as far as the plan lets them."""
        for part in parts:
            part.leave()

    def smaller(self) -> bool:
        """Go over to the next smaller plan, which is told; False where there is none."""
        below = self.plan.smaller()
        if below is None:
            return False
        self._gone_down += 1
        logger.warning("Going over to a smaller memory plan: %s.", below)
        self.plan = below
        self._follow(below)
        return True

    @property
    def mmdit(self) -> "Part[nn.Module]":
        """The part that is needed at every step."""
        return self._parts["mmdit"]

    @property
    def tokens(self) -> int:
        """Of text and image that a call of the model may have, over all rows, by what was planned for."""
        work, config = self.plan.work, self.mmdit.config
        assert isinstance(config, MMDiTConfig)
        return work.rows * (work.tokens + work.image_tokens(config))

    def needs(self, kind: str) -> int:
        """Bytes of weights that a part has on the device while it is used."""
        shape, stay = self._shapes.parts[kind], self.plan.parts[kind]
        passing = [shape.units[i] for i in stay.streamed_units]
        modulation = 0 if self.plan.modulation_streamed else sum(shape.modulation)
        resident = sum(shape.units[i] for i in stay.resident_units)
        return shape.rest + resident + modulation + min(stay.slots, len(passing)) * max(passing, default=0)

    def __str__(self) -> str:
        return str(self.plan)

    def _planned(self, work: Work) -> Plan:
        device = next(iter(self._parts.values())).device
        card = card_here(device)
        try:
            plan = make_plan(self._shapes, self.budget.nbytes, card, work=work)
        except PlacementError as error:
            if self.budget.named:
                raise
            logger.warning("%s is free on %s. %s", human(self.budget.nbytes), device, error)
            plan = make_plan(self._shapes, error.least, card, work=work)
        for _ in range(self._gone_down):
            plan = plan.smaller() or plan
        return plan

    def _follow(self, plan: Plan) -> None:
        stays = {part: plan.parts[kind] for kind, part in self._parts.items()}
        changed = [part for part, stay in stays.items() if part.stay != stay]
        nets = bool(self._nets) and self._place_nets(plan.parts["controlnet"])
        mmdit = self._parts["mmdit"]
        if mmdit.modulation_streamed != plan.modulation_streamed and mmdit not in changed:
            changed.append(mmdit)
        if changed or nets:
            logger.info("Memory plan: %s.", plan)
        for part in changed:
            part.place(stays[part], modulation_streamed=plan.modulation_streamed, needs=self.needs(part.kind))

    def _arriving(self, part: "Part[nn.Module]") -> None:
        leave_others(part, self._parts.values())
        model = self.mmdit.in_memory
        if part.kind not in ("mmdit", "controlnet") and model is not None:
            # While it denoises, its graphs hold what its work would take anyway; in other stages they are in the way.
            others = max(stage.peak for name, stage in self.plan.stages.items() if name in ("encode", "decode"))
            drop_beyond(model, self.budget.nbytes - others)

    # ControlNets: one part of the plan, as large as all of them

    def _with_nets(self) -> Shapes:
        nets = [self._shape_of(net) for net in self._nets.values()]
        largest = max(nets, key=lambda shape: shape.nbytes)
        units = tuple(size for shape in nets for size in shape.units)
        merged = replace(largest, units=units, rest=sum(shape.rest for shape in nets))
        return Shapes({**self._shapes.parts, "controlnet": merged}, self._shapes.itemsize)

    def _place_nets(self, stay: Stay) -> bool:
        """Let each net have its share of the blocks that stay; whether that is news."""
        changed = False
        for net in self._nets.values():
            shape = self._shape_of(net)
            layers = len(shape.units)
            resident = stay.resident * layers // stay.layers
            its = Stay(resident=resident, layers=layers, slots=stay.slots, leaves=stay.leaves)
            if net.stay != its:
                share = sum(shape.units[i] for i in its.resident_units) + shape.rest
                net.place(its, needs=share + min(its.slots, layers - resident) * max(shape.units))
                changed = True
        return changed

    def _shape_of(self, net: "Part[ControlNet]") -> PartShape:
        both = {"mmdit": self._parts["mmdit"].skeleton, "controlnet": net.skeleton}
        return Shapes.of(both, net.dtype).parts["controlnet"]


def _each(choose: Callable[[int, int], int], one: Work, other: Work) -> Work:
    return Work(**{name: choose(getattr(one, name), getattr(other, name)) for name in NUMBERS})


def leave_others(part: "Part[Any]", others: "Iterable[Part[Any]]") -> None:
    """A part comes to the device: the others leave, as far as they may, but for those that it shares a stage with."""
    together: tuple[str, ...] = ("mmdit", "controlnet")
    if part.kind not in together:
        # Encoders that stream have their stage one after the other.
        together = ENCODERS if part.kind in ENCODERS and not (part.stay is not None and part.stay.streamed) else ()
    for other in others:
        if other is not part and other.kind not in together:
            other.leave()


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of a device's memory may be used."""

    nbytes: int
    named: bool = False  # by the user: what needs more is refused


def check_vram(vram: str, device: torch.device) -> None:
    """Refuse what a user cannot mean.

    Raises:
        RequestError: the device is a CPU, whose memory is the machine's; or it is no size.
    """
    if device.type == "cpu":
        raise RequestError(
            f"--vram {vram} is about a GPU's memory, and this draws on the CPU, where weights that come and go would "
            "only cost time. Leave it out; FP8 files and --force-fp8 are what saves memory here."
        )
    parse_bytes(vram, total=None if device.type != "cuda" else torch.cuda.get_device_properties(device).total_memory)


def budget_of(vram: str | int | Budget | None, device: torch.device) -> Budget | None:
    """How much of the device's memory may be used; None where nobody plans it.

    Args:
        vram: "6GB", "80%", bytes; None for what is free on a CUDA device, and for no plan on others.
        device: where the work is done. On a CPU a plan can be followed, for tests: there it only costs.

    Raises:
        RequestError: it is no size, or the device shares the machine's memory.
    """
    if isinstance(vram, Budget):
        return vram
    if vram is None:
        free = budget_here(device)
        return None if device.type != "cuda" or free is None else Budget(free)
    if device.type not in ("cuda", "cpu"):
        raise RequestError(f"'{device}' shares the machine's memory: a plan for it would save nothing. Leave vram out.")
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    budget = vram if isinstance(vram, int) else parse_bytes(vram, total=total)
    if total is not None:
        # A promise: who exceeds it is told so as if the device were that small, and goes over to a smaller plan.
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    return Budget(budget, named=True)
