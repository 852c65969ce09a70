"""Nodes that change, mix and join conditioning; what they do to pictures is among the recorded runs."""

from typing import Any

import pytest
import torch

from octavo.errors import RequestError
from octavo.graph.nodes import conditioning as nodes
from octavo.graph.nodes.types import Conditions
from octavo.graph.spec import NodeSpec
from octavo.pipeline.conditions import Condition
from octavo.pipeline.encode import Conditioning

NOWHERE: Any = None  # these nodes use nothing of their context


def text(rows: int, value: float, *, width: int = 4, **more: Any) -> Condition:
    filled = Conditioning(torch.full((1, rows, width), value), torch.full((1, 2 * width), value))
    return Condition(conditioning=filled, **more)


def one(spec: NodeSpec, **inputs: Any) -> Conditions:
    outputs = spec.run(NOWHERE, **inputs)
    assert isinstance(outputs, tuple)
    (conditions,) = outputs
    return tuple(conditions)


EDITS: list[tuple[NodeSpec, dict[str, Any]]] = [
    (nodes.conditioning_zero_out, {}),
    (nodes.conditioning_set_timestep_range, {"start": 0.1, "end": 0.9}),
    (nodes.conditioning_set_area, {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 2.0}),
    (
        nodes.conditioning_set_area_percentage,
        {"width": 0.5, "height": 0.5, "x": 0.0, "y": 0.0, "strength": 2.0},
    ),
    (nodes.conditioning_set_mask, {"mask": torch.ones(1, 8, 8), "strength": 0.5, "set_cond_area": "mask bounds"}),
]


@pytest.mark.parametrize(("spec", "inputs"), EDITS)
def test_every_text_of_a_conditioning_is_edited_and_the_original_is_not(spec: NodeSpec, inputs: dict[str, Any]) -> None:
    given = (text(3, 1.0), text(5, 2.0))
    edited = one(spec, conditioning=given, **inputs)
    assert len(edited) == 2
    for before, after in zip(given, edited, strict=True):
        assert after is not before
        assert after.conditioning.context.shape == before.conditioning.context.shape
        assert before.conditioning.context.any()
        assert (before.strength, before.area, before.mask, before.start, before.end) == (1.0, None, None, 0.0, 1.0)


def test_zeros_keep_where_and_when_a_text_holds() -> None:
    (zeros,) = one(nodes.conditioning_zero_out, conditioning=(text(3, 1.0, start=0.5, area=(8, 8, 0, 0)),))
    assert not zeros.conditioning.context.any()
    assert not zeros.conditioning.pooled.any()
    assert (zeros.start, zeros.area) == (0.5, (8, 8, 0, 0))


def test_an_area_in_pixels_is_one_in_latent_pixels() -> None:
    (placed,) = one(
        nodes.conditioning_set_area, conditioning=(text(3, 1.0),), width=128, height=64, x=24, y=16, strength=0.7
    )
    assert placed.area == (8, 16, 2, 3)
    assert all(isinstance(side, int) for side in placed.area)
    assert placed.strength == 0.7


def test_an_area_in_fractions_stays_in_fractions_even_where_they_are_whole() -> None:
    inputs = {"width": 1, "height": 1, "x": 0, "y": 0, "strength": 1.0}
    (placed,) = one(nodes.conditioning_set_area_percentage, conditioning=(text(3, 1.0),), **inputs)
    assert placed.area == (1.0, 1.0, 0.0, 0.0)
    assert all(isinstance(side, float) for side in placed.area)


@pytest.mark.parametrize(("set_cond_area", "bounds"), [("default", False), ("mask bounds", True)])
def test_a_mask_of_one_picture_may_lack_the_batch(set_cond_area: str, bounds: bool) -> None:
    inputs = {"mask": torch.ones(8, 6), "strength": 0.5, "set_cond_area": set_cond_area}
    (masked,) = one(nodes.conditioning_set_mask, conditioning=(text(3, 1.0),), **inputs)
    assert masked.mask is not None
    assert masked.mask.shape == (1, 8, 6)
    assert (masked.mask_strength, masked.mask_bounds) == (0.5, bounds)


def test_joined_rows_follow_and_the_pooled_text_is_the_first() -> None:
    (joined,) = one(nodes.conditioning_concat, conditioning_to=(text(3, 1.0),), conditioning_from=(text(2, 5.0),))
    assert joined.conditioning.context[0, :, 0].tolist() == [1, 1, 1, 5, 5]
    assert joined.conditioning.pooled.unique().tolist() == [1]


@pytest.mark.parametrize(("rows", "expected"), [(3, [2, 2, 2]), (2, [2, 2, 0.75]), (4, [2, 2, 2])])
def test_a_mixture_is_as_long_as_the_first_text(rows: int, expected: list[float]) -> None:
    """0.75 of 1 and 0.25 of 5 are 2; where the second text has no rows it counts as 0."""
    inputs = {"conditioning_to": (text(3, 1.0),), "conditioning_from": (text(rows, 5.0),)}
    (mixed,) = one(nodes.conditioning_average, conditioning_to_strength=0.75, **inputs)
    assert mixed.conditioning.context[0, :, 0].tolist() == expected
    assert mixed.conditioning.pooled.unique().tolist() == [2]


@pytest.mark.parametrize(
    ("spec", "more"),
    [(nodes.conditioning_concat, {}), (nodes.conditioning_average, {"conditioning_to_strength": 0.5})],
)
def test_texts_that_would_be_forgotten_or_do_not_fit_are_refused(spec: NodeSpec, more: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="2 texts"):
        one(spec, conditioning_to=(text(3, 1.0),), conditioning_from=(text(3, 1.0), text(3, 1.0)), **more)
    with pytest.raises(RequestError, match="widths 4 and 6"):
        one(spec, conditioning_to=(text(3, 1.0),), conditioning_from=(text(3, 1.0, width=6),), **more)
