"""A placed model's work as tasks for the simulated device: encode, modulation, denoise, decode.

Times are those of a picture after the first: weights that do not stay on the device lie in pinned memory of the host.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol, cast

from octavo.models.clip import ClipConfig
from octavo.models.controlnet import ControlNetConfig
from octavo.models.mmdit import MMDiTConfig
from octavo.models.t5 import T5Config
from octavo.models.vae import VAEConfig
from octavo.placement import costs
from octavo.placement.cards import Card
from octavo.placement.shapes import PartShape, Shapes
from octavo.placement.simulate import Task, Timeline, simulate
from octavo.placement.work import Work

OVERLAP = 16  # latent pixels that neighbouring tiles share, at most


class Stays(Protocol):
    """How a part is placed; `plan.Stay` is."""

    @property
    def slots(self) -> int: ...
    @property
    def leaves(self) -> bool: ...
    @property
    def streamed(self) -> bool: ...
    @property
    def streamed_units(self) -> tuple[int, ...]: ...


def run(
    shapes: Shapes,
    work: Work,
    stays: Mapping[str, Stays],
    *,
    modulation_streamed: bool,
    tile: int | None,
    card: Card,
    fast: bool = False,
) -> Timeline:
    """What the simulated `card` does for one picture, or for as many as `work` draws together.

    Args:
        fast: attend in eight bits, as `--fast` lets a model with FP8 weights do where the card has units for it.
    """
    tasks = [
        *_encode(shapes, work, stays, card),
        *_modulation(shapes, work, streamed=modulation_streamed, card=card),
        *_denoise(shapes, work, stays, card, fast=fast),
        *_decode(shapes, work, stays, tile, card),
    ]
    slots = {kind: stay.slots for kind, stay in stays.items()}
    # What comes as a whole has room as a whole.
    many = {f"{kind}, whole": max(1, sum(task.pool == f"{kind}, whole" for task in tasks)) for kind in stays}
    return simulate(tasks, slots={**slots, **many, "modulation": 2}, link=card.link)


def _encode(shapes: Shapes, work: Work, stays: Mapping[str, Stays], card: Card) -> Iterator[Task]:
    for kind, part in shapes.encoders.items():
        stay = stays[kind]
        rest = part.rest if stay.leaves else 0
        yield Task(stage="encode", name=kind, compute=0.0, copy=rest, pool=f"{kind}, whole")
        for i, nbytes in enumerate(part.units):
            cost = costs.encoder_layer(cast("ClipConfig | T5Config", part.config), nbytes, work)
            yield Task(
                stage="encode",
                name=f"{kind} {i}",
                compute=work.prompts * cost.seconds(card, fp8=_in_fp8(part)),  # layer by layer, see `T5Encoder.encode`
                copy=nbytes if i in stay.streamed_units else 0,
                pool=kind,
            )


def _modulation(shapes: Shapes, work: Work, *, streamed: bool, card: Card) -> Iterator[Task]:
    for kind, part in shapes.parts.items():
        for i, nbytes in enumerate(part.modulation):
            # Never rounded to FP8: few rows, so that reading the weights is all that takes time.
            cost = costs.modulation(part, nbytes, work, itemsize=shapes.itemsize)
            copy = nbytes if streamed else 0  # once for all prompts, see `MMDiT.modulations`
            seconds = work.prompts * cost.seconds(card, fp8=False)
            yield Task(stage="modulation", name=f"{kind} {i}", compute=seconds, copy=copy, pool="modulation")


def _denoise(shapes: Shapes, work: Work, stays: Mapping[str, Stays], card: Card, *, fast: bool) -> Iterator[Task]:
    part, stay = shapes.parts["mmdit"], stays["mmdit"]
    config, fp8 = cast(MMDiTConfig, part.config), _in_fp8(part)
    passes: costs.Passes = "8 bits" if fp8 and card.fp8 is not None else "16 bits"
    each = (costs.mmdit_block(config, i, work, part, passes=passes) for i in range(config.depth))
    blocks = [cost.seconds(card, fp8=fp8, attention_8bit=fast) for cost in each]
    ends = costs.mmdit_ends(config, work).seconds(card, fp8=fp8)
    streamed = frozenset(stay.streamed_units)
    control = list(_control_step(shapes, work, stays, card))
    for _ in range(work.steps):
        yield from control
        yield Task(stage="denoise", name="ends", compute=ends)
        for i, nbytes in enumerate(part.units):
            copy = nbytes if i in streamed else 0
            yield Task(stage="denoise", name=f"block {i}", compute=blocks[i], copy=copy, pool="mmdit")


def _control_step(shapes: Shapes, work: Work, stays: Mapping[str, Stays], card: Card) -> Iterator[Task]:
    if "controlnet" not in shapes.parts:
        return
    part, stay = shapes.parts["controlnet"], stays["controlnet"]
    for i, nbytes in enumerate(part.units):
        cost = costs.controlnet_block(cast(ControlNetConfig, part.config), work, nbytes)
        copy = nbytes if i in stay.streamed_units else 0
        seconds = cost.seconds(card, fp8=_in_fp8(part))
        yield Task(stage="denoise", name=f"control {i}", compute=seconds, copy=copy, pool="controlnet")


def _decode(shapes: Shapes, work: Work, stays: Mapping[str, Stays], tile: int | None, card: Card) -> Iterator[Task]:
    if "vae" not in shapes.parts:
        return
    part = shapes.parts["vae"]
    cost = costs.vae_decode(cast(VAEConfig, part.config), part, work).times(_repeated(work.latents, tile))
    copy = part.nbytes if stays["vae"].leaves else 0
    yield Task(stage="decode", name="vae", compute=0.0, copy=copy, pool="vae, whole")
    yield Task(stage="decode", name="decode", compute=cost.times(work.pictures).seconds(card, fp8=False))


def _in_fp8(part: PartShape) -> bool:
    return part.fp8 > 0.5


def _repeated(size: tuple[int, int], tile: int | None) -> float:
    """How much of the work tiles do, for they overlap."""
    factor = 1.0
    for side in size:
        if tile is not None and tile < side:
            shared = min(OVERLAP, tile // 4)
            starts = range(0, side - shared, tile - shared)
            factor *= sum(min(tile, side - start) for start in starts) / side
    return factor
