"""Nodes that change, mix and join what the model is told: where, when and how strongly a text holds."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes.limits import check_conditions, check_tokens
from octavo.graph.nodes.types import Conditions
from octavo.graph.spec import COMBO, FLOAT, INT, LINK, NodeSpec, node
from octavo.pipeline.conditions import Condition
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.latents import FACTOR

_STRENGTH = FLOAT(1.0, min=0.0, max=10.0, step=0.01)


@node(
    "ConditioningZeroOut",
    category="advanced/conditioning",
    description="The same conditioning with nothing but zeros in it; as a negative it is weaker than an empty text.",
    inputs={"conditioning": LINK("CONDITIONING")},
    outputs=("CONDITIONING",),
    search_aliases=("null conditioning", "clear conditioning"),
)
def conditioning_zero_out(_context: Context, conditioning: Conditions) -> tuple[Conditions]:
    """Zeros of the same shape."""
    return _each(
        conditioning,
        lambda c: replace(c, conditioning=Conditioning(*map(torch.zeros_like, _tensors(c)))),
    )


@node(
    "ConditioningCombine",
    display_name="Conditioning (Combine)",
    category="conditioning",
    description="Both hold: the model is asked with each, and its answers are averaged.",
    inputs={"conditioning_1": LINK("CONDITIONING"), "conditioning_2": LINK("CONDITIONING")},
    outputs=("CONDITIONING",),
    search_aliases=("combine", "combine prompts", "merge prompts", "mix prompts"),
)
def conditioning_combine(
    _context: Context, conditioning_1: Conditions, conditioning_2: Conditions
) -> tuple[Conditions]:
    """One after the other."""
    check_conditions(len(conditioning_1) + len(conditioning_2))
    return ((*conditioning_1, *conditioning_2),)


@node(
    "ConditioningConcat",
    display_name="Conditioning (Concat)",
    category="conditioning",
    description="The model reads the second text after the first; the pooled text stays that of the first.",
    inputs={"conditioning_to": LINK("CONDITIONING"), "conditioning_from": LINK("CONDITIONING")},
    outputs=("CONDITIONING",),
)
def conditioning_concat(
    _context: Context, conditioning_to: Conditions, conditioning_from: Conditions
) -> tuple[Conditions]:
    """Rows of `conditioning_from` after those of each of `conditioning_to`."""
    rows = _only(conditioning_from, "ConditioningConcat").conditioning.context

    def longer(c: Condition) -> Condition:
        context, pooled = _tensors(c)
        check_tokens(context.shape[1] + rows.shape[1])
        return replace(c, conditioning=Conditioning(torch.cat([context, _suiting(rows, context)], dim=1), pooled))

    return _each(conditioning_to, longer)


@node(
    "ConditioningAverage",
    category="conditioning",
    description="A mixture: 1 is the first text alone, 0 the second.",
    inputs={
        "conditioning_to": LINK("CONDITIONING"),
        "conditioning_from": LINK("CONDITIONING"),
        "conditioning_to_strength": FLOAT(1.0, min=0.0, max=1.0, step=0.01),
    },
    outputs=("CONDITIONING",),
    search_aliases=("blend prompts", "interpolate conditioning", "mix prompts"),
)
def conditioning_average(
    _context: Context, conditioning_to: Conditions, conditioning_from: Conditions, conditioning_to_strength: float
) -> tuple[Conditions]:
    """Row by row; `conditioning_from` is cut, or filled up with zeros, to the length of the other."""
    other_context, other_pooled = _tensors(_only(conditioning_from, "ConditioningAverage"))
    strength = conditioning_to_strength

    def mixed(c: Condition) -> Condition:
        context, pooled = _tensors(c)
        rows = _suiting(other_context, context)[:, : context.shape[1]]
        rows = F.pad(rows, (0, 0, 0, context.shape[1] - rows.shape[1]))
        of_both = Conditioning(
            context * strength + rows * (1 - strength),
            pooled * strength + _suiting(other_pooled, pooled) * (1 - strength),
        )
        return replace(c, conditioning=of_both)

    return _each(conditioning_to, mixed)


@node(
    "ConditioningSetTimestepRange",
    category="advanced/conditioning",
    description="When the text holds, as fractions of the way from noise (0) to the picture (1).",
    inputs={
        "conditioning": LINK("CONDITIONING"),
        "start": FLOAT(0.0, min=0.0, max=1.0, step=0.001),
        "end": FLOAT(1.0, min=0.0, max=1.0, step=0.001),
    },
    outputs=("CONDITIONING",),
)
def conditioning_set_timestep_range(
    _context: Context, conditioning: Conditions, start: float, end: float
) -> tuple[Conditions]:
    """The same text for a part of the run."""
    return _each(conditioning, lambda c: replace(c, start=start, end=end))


@node(
    "ConditioningSetArea",
    display_name="Conditioning (Set Area)",
    category="conditioning",
    description="Where the text holds: a rectangle in pixels.",
    inputs={
        "conditioning": LINK("CONDITIONING"),
        "width": INT(64, min=64, max=16384, step=8),
        "height": INT(64, min=64, max=16384, step=8),
        "x": INT(0, min=0, max=16384, step=8),
        "y": INT(0, min=0, max=16384, step=8),
        "strength": _STRENGTH,
    },
    outputs=("CONDITIONING",),
    search_aliases=("regional prompt", "area prompt"),
)
def conditioning_set_area(
    _context: Context, conditioning: Conditions, width: int, height: int, x: int, y: int, strength: float
) -> tuple[Conditions]:
    """The same text for a rectangle, its sides rounded down to latent pixels."""
    area = (height // FACTOR, width // FACTOR, y // FACTOR, x // FACTOR)
    return _each(conditioning, lambda c: replace(c, area=area, strength=strength, mask_bounds=False))


@node(
    "ConditioningSetAreaPercentage",
    display_name="Conditioning (Set Area with Percentage)",
    category="conditioning",
    description="Where the text holds: a rectangle in fractions of the picture's sides.",
    inputs={
        "conditioning": LINK("CONDITIONING"),
        "width": FLOAT(1.0, min=0, max=1.0, step=0.01),
        "height": FLOAT(1.0, min=0, max=1.0, step=0.01),
        "x": FLOAT(0, min=0, max=1.0, step=0.01),
        "y": FLOAT(0, min=0, max=1.0, step=0.01),
        "strength": _STRENGTH,
    },
    outputs=("CONDITIONING",),
)
def conditioning_set_area_percentage(
    _context: Context, conditioning: Conditions, width: float, height: float, x: float, y: float, strength: float
) -> tuple[Conditions]:
    """The same text for a rectangle."""
    area = (float(height), float(width), float(y), float(x))
    return _each(conditioning, lambda c: replace(c, area=area, strength=strength, mask_bounds=False))


@node(
    "ConditioningSetMask",
    display_name="Conditioning (Set Mask)",
    category="conditioning",
    description="Where the text holds: the white of a mask. With mask bounds, the model sees only the part of the "
    "picture around it.",
    inputs={
        "conditioning": LINK("CONDITIONING"),
        "mask": LINK("MASK"),
        "strength": _STRENGTH,
        "set_cond_area": COMBO(("default", "mask bounds")),
    },
    outputs=("CONDITIONING",),
    search_aliases=("masked prompt", "regional prompt"),
)
def conditioning_set_mask(
    _context: Context, conditioning: Conditions, mask: Tensor, strength: float, set_cond_area: str
) -> tuple[Conditions]:
    """The same text where the mask is white."""
    rows = mask[None] if mask.dim() == 2 else mask
    bounds = set_cond_area == "mask bounds"
    return _each(conditioning, lambda c: replace(c, mask=rows, mask_strength=strength, mask_bounds=bounds))


def _each(conditions: Conditions, change: Callable[[Condition], Condition]) -> tuple[Conditions]:
    return (tuple(change(condition) for condition in conditions),)


def _tensors(condition: Condition) -> tuple[Tensor, Tensor]:
    return condition.conditioning.context, condition.conditioning.pooled


def _only(conditions: Conditions, name: str) -> Condition:
    """The one condition there is.

    Raises:
        RequestError: there are several, of which ComfyUI would take the first and forget the others.
    """
    if len(conditions) != 1:
        raise RequestError(
            f"conditioning_from holds {len(conditions)} texts, and {name} takes one: join them to conditioning_to one "
            "after the other, or combine afterwards."
        )
    return conditions[0]


def _suiting(other: Tensor, like: Tensor) -> Tensor:
    """`other` where `like` is.

    Raises:
        RequestError: it is of another width.
    """
    if other.shape[-1] != like.shape[-1]:
        raise RequestError(
            f"The two texts were encoded to widths {like.shape[-1]} and {other.shape[-1]}, by encoders of different "
            "models; use the same encoders for both."
        )
    return other.to(like)


NODES: tuple[NodeSpec, ...] = (
    conditioning_zero_out,
    conditioning_combine,
    conditioning_concat,
    conditioning_average,
    conditioning_set_timestep_range,
    conditioning_set_area,
    conditioning_set_area_percentage,
    conditioning_set_mask,
)
