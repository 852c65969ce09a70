"""What of a model stays on a device, what passes through it, how wide its work gets: a `Plan` for a number of bytes.

Plans stand on a ladder, the fastest on top, and `make_plan` takes the first that fits:

1. everything stays;
2. text encoders and VAE are there only while they work; the encoders pass through layer by layer, once for all prompts;
3. the modulation's weights, a third of the MMDiT, pass through once a run;
4. blocks of the MMDiT pass through at each step: as few as needed, evenly among those that stay, so that each copy has
   the work of its neighbours to hide behind;
5. the VAE decodes in tiles, the only rung that changes a picture (a little).

How a plan is carried out is `stream`'s business; here nothing is loaded and nothing asked of any device.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

from octavo.errors import PlacementError
from octavo.models.clip import ClipConfig
from octavo.models.controlnet import ControlNetConfig
from octavo.models.mmdit import MMDiTConfig
from octavo.models.t5 import T5Config
from octavo.models.vae import VAEConfig
from octavo.placement import activations
from octavo.placement.cards import Card
from octavo.placement.schedule import run
from octavo.placement.shapes import PartShape, Shapes
from octavo.placement.simulate import Timeline
from octavo.placement.sizes import human
from octavo.placement.work import Work

STAGES = ("encode", "modulation", "denoise", "decode")
TILES = (64, 48, 32)  # latent pixels, with the overlap that `pipeline.decode` has for them
STEP = 0.9  # of the peak before, which the next smaller plan stays below


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """How one part is placed on the device."""

    resident: int  # of its units, how many stay while the part is used
    layers: int  # units that it has: joint blocks, encoder layers; 0 of a VAE, which has none
    slots: int = 2  # buffers through which the others pass, each as large as the largest of them
    leaves: bool = False  # whether it is on the device only while it works, and lies in the host's memory otherwise

    @property
    def streamed(self) -> bool:
        """Whether units pass through."""
        return self.resident < self.layers

    @property
    def streamed_units(self) -> tuple[int, ...]:
        """Which ones, spread evenly."""
        passing = self.layers - self.resident
        return tuple(k * self.layers // passing for k in range(passing))

    @property
    def resident_units(self) -> tuple[int, ...]:
        """The others."""
        passing = frozenset(self.streamed_units)
        return tuple(i for i in range(self.layers) if i not in passing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The device during one part of the walk: bytes, and seconds as a simulated card would take."""

    weights: int  # bytes that stay
    buffers: int  # bytes through which other weights pass
    work: int  # bytes of activations, tables and what libraries take
    seconds: float | None = None  # predicted; None without a card

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return self.weights + self.buffers + self.work


@dataclass(frozen=True, kw_only=True)
class Plan:
    """See the module. The bytes are those of tensors: what a driver's context takes is not among them."""

    budget: int  # bytes of device memory that may be used
    parts: Mapping[str, Stay]  # by kind
    modulation_streamed: bool  # adaLN weights pass through once a run, and are not there while denoising
    tile: int | None  # side of the VAE's tiles in latent pixels; None: whole, in exact chunks
    stages: Mapping[str, Stage]  # encode, modulation, denoise, decode
    shapes: Shapes = field(repr=False)
    work: Work
    card: Card | None = field(repr=False)

    @property
    def peak(self) -> int:
        """Bytes at most, of all stages."""
        return max(stage.peak for stage in self.stages.values())

    @property
    def seconds(self) -> float | None:
        """Predicted, of a picture (of all that are drawn together) after the first; None without a card."""
        known = [stage.seconds for stage in self.stages.values() if stage.seconds is not None]
        return sum(known) if known else None

    @property
    def streamed(self) -> bool:
        """Whether anything passes through buffers."""
        return self.modulation_streamed or any(stay.streamed for stay in self.parts.values())

    @cached_property
    def timeline(self) -> Timeline:
        """What the simulated card does."""
        assert self.card is not None, "planned without a card"
        return run(
            self.shapes,
            self.work,
            self.parts,
            modulation_streamed=self.modulation_streamed,
            tile=self.tile,
            card=self.card,
        )

    def smaller(self) -> "Plan | None":
        """The first plan below this one that takes a tenth less, else the least; None where this is the least."""
        below = [rung for rung in _rungs(self.shapes) if _peak(self.shapes, self.work, rung) < self.peak]
        if not below:
            return None
        wanted = STEP * self.peak
        for rung in below:
            if _peak(self.shapes, self.work, rung) <= wanted:
                return _planned(self.shapes, int(wanted), self.card, self.work, rung)
        least = min(below, key=lambda rung: _peak(self.shapes, self.work, rung))
        return _planned(self.shapes, _peak(self.shapes, self.work, least), self.card, self.work, least)

    def __str__(self) -> str:
        """One line: what passes through, and the peak."""
        said = [_told(kind, stay) for kind, stay in self.parts.items() if stay.streamed or stay.leaves]
        if self.modulation_streamed:
            said.append("modulation passes through once a run")
        if self.tile is not None:
            said.append(f"VAE in tiles of {8 * self.tile} pixels")
        return f"{human(self.peak)} at most of {human(self.budget)}: {'; '.join(said) or 'everything stays'}"


def make_plan(shapes: Shapes, budget: int, card: Card | None = None, *, work: Work | None = None) -> Plan:
    """The fastest plan whose peak is within `budget`.

    Args:
        shapes: of the parts that the model has.
        budget: bytes of device memory for tensors.
        card: for predicted times; none without it.
        work: the largest that is to be drawn.

    Raises:
        PlacementError: there is none; says the least that would do.
    """
    work = work or Work()
    for rung in _rungs(shapes):
        if _peak(shapes, work, rung) <= budget:
            return _planned(shapes, budget, card, work, rung)
    least = min(_peak(shapes, work, rung) for rung in _rungs(shapes))
    raise PlacementError(
        f"{human(budget)} of device memory do not suffice for pictures of {work.width}x{work.height} pixels, "
        f"{work.rows} rows at a time: even with all weights passing through, {human(least)} are needed. "
        "Allow that much, or draw smaller or fewer pictures at once, or use an FP8 model.",
        least=least,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rung:
    """A place on the ladder."""

    apart: bool = False  # encoders and VAE are there only while they work, the encoders layer by layer
    modulation_streamed: bool = False
    passing: int = 0  # blocks of the MMDiT
    tile: int | None = None


def _rungs(shapes: Shapes) -> Iterator[_Rung]:
    yield _Rung()
    rung = _Rung(apart=True)
    yield rung
    rung = replace(rung, modulation_streamed=bool(shapes.parts["mmdit"].modulation))
    yield rung
    depth = len(shapes.parts["mmdit"].units)
    for passing in range(1, depth + 1):
        yield replace(rung, passing=passing)
    for tile in TILES if "vae" in shapes.parts else ():
        for passing in range(depth + 1):
            yield replace(rung, passing=passing, tile=tile)


def _stays(shapes: Shapes, rung: _Rung) -> dict[str, Stay]:
    stays = {}
    depth = len(shapes.parts["mmdit"].units)
    for kind, part in shapes.parts.items():
        layers = len(part.units)
        if kind in shapes.encoders:
            stays[kind] = Stay(resident=0 if rung.apart else layers, layers=layers, leaves=rung.apart)
        elif kind == "vae":
            stays[kind] = Stay(resident=0, layers=0, leaves=rung.apart)
        else:
            # A ControlNet's blocks pass in proportion.
            stays[kind] = Stay(resident=layers - -(-rung.passing * layers // depth), layers=layers)
    return stays


def _stages(shapes: Shapes, work: Work, rung: _Rung) -> dict[str, Stage]:
    """Bytes of each stage, without times."""
    stays, parts = _stays(shapes, rung), shapes.parts
    mmdit, control, vae = parts["mmdit"], parts.get("controlnet"), parts.get("vae")
    config, itemsize = cast(MMDiTConfig, mmdit.config), shapes.itemsize
    fp8 = mmdit.fp8 > 0

    always = sum(_resident(parts[kind], stays[kind]) for kind in ("mmdit", "controlnet") if kind in parts)
    adaln = [nbytes for part in parts.values() for nbytes in part.modulation]
    always += 0 if rung.modulation_streamed else sum(adaln)
    encoders = shapes.encoders.values()
    whole = sum(part.nbytes for part in encoders)
    of_vae = 0 if vae is None else vae.nbytes
    kept = 0 if rung.apart else whole + of_vae
    held = activations.conditioning(config, work, itemsize=itemsize) + activations.WORKSPACE

    encode = max(
        (activations.encoder(cast("ClipConfig | T5Config", p.config), work, itemsize=itemsize) for p in encoders),
        default=0,
    )
    rest = buffers = 0
    if rung.apart:
        # One after the other, each with its own rest and buffers.
        rest = max((part.rest for part in encoders), default=0)
        buffers = max((_buffers(part.units, 2) for part in encoders), default=0)
    passing = _buffers(adaln, 2) if rung.modulation_streamed else 0
    denoise = activations.mmdit_step(config, work, itemsize=itemsize, fp8=fp8)
    if control is not None:
        of_control = cast(ControlNetConfig, control.config)
        denoise += activations.controlnet_step(of_control, work, itemsize=itemsize, fp8=control.fp8 > 0)
    decode = 0
    if vae is not None:
        decode = activations.vae_decode(cast(VAEConfig, vae.config), work, itemsize=itemsize, tile=rung.tile)
    return {
        "encode": Stage(weights=always + kept + rest, buffers=buffers, work=held + encode),
        "modulation": Stage(
            weights=always + kept, buffers=passing, work=held + activations.modulation(config, work, itemsize=itemsize)
        ),
        "denoise": Stage(
            weights=always + kept,
            buffers=sum(_slots(parts[kind], stays[kind]) for kind in ("mmdit", "controlnet") if kind in parts),
            work=held + denoise + activations.tables(config, work, itemsize=itemsize),
        ),
        "decode": Stage(
            weights=always + (of_vae if rung.apart else kept),
            buffers=0,
            work=held + decode + activations.tables(config, work, itemsize=itemsize),
        ),
    }


def _peak(shapes: Shapes, work: Work, rung: _Rung) -> int:
    return max(stage.peak for stage in _stages(shapes, work, rung).values())


def _planned(shapes: Shapes, budget: int, card: Card | None, work: Work, rung: _Rung) -> Plan:
    plan = Plan(
        budget=budget,
        parts=_stays(shapes, rung),
        modulation_streamed=rung.modulation_streamed,
        tile=rung.tile,
        stages=_stages(shapes, work, rung),
        shapes=shapes,
        work=work,
        card=card,
    )
    if card is None:
        return plan
    seconds = plan.timeline.seconds
    timed = {name: replace(stage, seconds=seconds.get(name, 0.0)) for name, stage in plan.stages.items()}
    return replace(plan, stages=timed)


def _resident(part: PartShape, stay: Stay) -> int:
    """Bytes of the MMDiT or of a ControlNet that stay, modulation left out."""
    return part.rest + sum(part.units[i] for i in stay.resident_units)


def _slots(part: PartShape, stay: Stay) -> int:
    return _buffers([part.units[i] for i in stay.streamed_units], stay.slots)


def _buffers(passing: Sequence[int], slots: int) -> int:
    return min(slots, len(passing)) * max(passing, default=0)


def _told(kind: str, stay: Stay) -> str:
    if stay.streamed and stay.resident:
        return f"{kind} streams {stay.layers - stay.resident} of {stay.layers}"
    return f"{kind} streams" if stay.streamed else f"{kind} leaves"
