"""Predictions as data, held against measurements; and the stored ones against what the code says today."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peer_passes, predict_aims
from benchmarks.gpu import summary
from benchmarks.predict import MODELS, SMALL, STORED, WORK, key, predict
from benchmarks.predicted import STORED as AIMS_STORED
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


# What an H200 should take


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    return predict_aims.figures()


def test_the_stored_aims_are_those_of_the_code(figures: dict[str, float]) -> None:
    """Written anew by `python -m benchmarks.predict_aims` whenever plans or costs change."""
    stored = json.loads((ROOT / AIMS_STORED).read_text("utf-8"))
    assert stored["predicted"] is True
    assert stored["figures"] == figures
    assert stored["assumed"] == predict_aims.ASSUMED
    assert set(stored["aims"]) <= set(figures)


@pytest.mark.parametrize("model", MODELS)
def test_ratios_are_of_their_figures_and_what_does_less_takes_less(figures: dict[str, float], model: str) -> None:
    for kind, end in (("step", ""), ("picture", ".whole")):
        of = {name: figures[f"{kind}.{model}.{name}{end}"] for name in (*predict_aims.OURS, *predict_aims.PEERS)}
        assert of["fp8_fast"] < of["fp8"] < of["diffusers_torchao_fp8_compiled"] < of["bfloat16"] < of["diffusers"]
        for ours in ("fp8", "fp8_fast"):
            for other in ("bfloat16", *predict_aims.PEERS):
                ratio = figures[f"{kind}.{model}.{ours}_over_{other}"]
                assert ratio == pytest.approx(of[ours] / of[other], rel=2e-3)
    for start in (f"cold.{model}", f"picture.{model}.fp8"):
        stages = [value for name, value in figures.items() if name.startswith(f"{start}.") and "whole" not in name]
        assert sum(stages) == pytest.approx(figures[f"{start}.whole"], rel=1e-3)


def test_a_whole_picture_is_what_octavo_plan_says(large: Shapes, figures: dict[str, float]) -> None:
    plan = make_plan(large, CARDS["h200"].usable, CARDS["h200"], work=WORK)
    assert figures["picture.large.fp8.whole"] == pytest.approx(plan.seconds, rel=1e-3)


def test_peers_start_the_kernels_that_were_counted() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    stored = json.loads((ROOT / peer_passes.STORED).read_text("utf-8"))
    if stored["versions"] != {"diffusers": diffusers.__version__, "torch": torch.__version__.partition("+")[0]}:
        pytest.skip("counted with other versions")
    for model in MODELS:
        assert stored[model] == peer_passes.count(model)


def test_what_was_measured_stands_beside_what_was_predicted_of_the_same_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    stored = json.loads(AIMS_STORED.read_text("utf-8"))["figures"]
    lines = [
        {"name": f"picture.large.{kind}.whole", "median": 2 * stored[f"picture.large.{kind}.whole"], "conditions": {}}
        for kind in ("bfloat16", "fp8")
    ]
    page = {"sections": [], "lines": [*lines, {"name": "a", "median": 1.0, "conditions": {}}], "errors": []}
    told = summary({**page, "device": "NVIDIA H200", "seconds": 1.0})["beside_predicted"]
    assert set(told) == {"picture.large.bfloat16.whole", "picture.large.fp8.whole", "picture.large.fp8_over_bfloat16"}
    assert told["picture.large.fp8.whole"]["ratio"] == 2
    assert told["picture.large.fp8_over_bfloat16"]["ratio"] == pytest.approx(1, abs=2e-3)
    assert summary({**page, "device": "NVIDIA L4", "seconds": 1.0})["beside_predicted"] == {}
