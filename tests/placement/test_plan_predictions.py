"""Predictions as data, held against measurements; and the stored ones against what the code says today."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predict import MODELS, SMALL, STORED, key, predict
from octavo.checkpoint.skeletons import skeletons
from octavo.errors import RequestError
from octavo.placement.cards import CARDS
from octavo.placement.plan import make_plan
from octavo.placement.predictions import NEAR, Comparison, compare, prediction
from octavo.placement.shapes import Shapes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def large() -> Shapes:
    return Shapes.of(skeletons("large", "fp8"))


@pytest.fixture(scope="module")
def told(large: Shapes) -> dict[str, Any]:
    return prediction(make_plan(large, 6 * 10**9, CARDS["l4-24gb"]))


def test_a_prediction_is_json_and_says_that_it_is_one(told: dict[str, Any]) -> None:
    again = json.loads(json.dumps(told))
    assert again["predicted"] is True
    assert again["peak"] == max(stage["peak"] for stage in again["stages"].values()) <= again["budget"]
    assert again["seconds"] == pytest.approx(sum(stage["seconds"] for stage in again["stages"].values()), rel=1e-3)
    assert again["parts"]["mmdit"]["layers"] == 38
    assert "datasheet" in again["rates"]


def test_what_was_measured_is_held_against_it_figure_by_figure(told: dict[str, Any]) -> None:
    seconds, peak = told["stages"]["denoise"]["seconds"], told["peak"]
    measured = {"peak": peak, "stages": {"denoise": {"seconds": seconds * 1.1}, "decode": {"peak": peak + 1}}}
    found = {each.what: each for each in compare(told, measured)}
    assert list(found) == ["peak", "denoise seconds", "decode peak"]
    assert found["peak"].kept
    assert found["denoise seconds"].kept
    assert found["denoise seconds"].ratio == pytest.approx(1.1)
    assert not found["decode peak"].kept


@pytest.mark.parametrize(
    ("unit", "ratio", "kept", "said"),
    [
        ("bytes", 0.5, True, "as predicted"), ("bytes", 1.0, True, "as predicted"), ("bytes", 1.01, False, "MORE"),
        ("s", NEAR * 1.01, False, "MORE"), ("s", NEAR * 0.99, True, "as predicted"),
        ("s", 0.99 / NEAR, False, "less than predicted"),
    ],
)  # fmt: skip
def test_bytes_are_bounds_and_seconds_estimates(unit: Any, ratio: float, kept: bool, said: str) -> None:
    comparison = Comparison("whole", unit, 8.0, 8.0 * ratio)
    assert comparison.kept == kept
    assert said in str(comparison)


def test_a_misspelt_figure_is_not_passed_over(told: dict[str, Any]) -> None:
    for measured in ({"second": 1.0}, {"stages": {"denoising": {}}}, {"stages": {"denoise": {"time": 1.0}}}):
        with pytest.raises(RequestError, match="can be compared"):
            compare(told, measured)


def test_the_stored_predictions_are_those_of_the_code(large: Shapes) -> None:
    """Written anew by `python -m benchmarks.predict` whenever plans or costs change."""
    stored = json.loads((ROOT / STORED).read_text("utf-8"))
    assert stored["predicted"] is True
    assert len(stored["predictions"]) == len(CARDS) * len(MODELS) * len(SMALL) * 2
    for card in CARDS:
        for memory in ("all", "small"):
            entry = stored["predictions"][key("large", "fp8", memory, card)]
            assert entry == predict(card, large, "fp8", memory)
            assert compare(entry, {"peak": entry["peak"]})[0].kept
