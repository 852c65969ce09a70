"""Which layers stay in 16 bits."""

from pathlib import Path

import pytest

from octavo.errors import RequestError
from octavo.quantize import Sensitivity, choose_kept

MEASURED = Sensitivity(
    errors={"big": 0.2, "small": 0.1, "harmless": 0.001, "tiny": 0.05},
    weights={"big": 1000, "small": 100, "harmless": 10, "tiny": 10},
)


def test_layers_are_ranked_by_squared_error_a_weight() -> None:
    assert MEASURED.ranked() == ["tiny", "small", "big", "harmless"]


@pytest.mark.parametrize(
    ("spare", "kept"),
    [
        (0, set()),
        (9, set()),
        (10, {"tiny"}),
        (110, {"tiny", "small"}),
        (120, {"tiny", "small", "harmless"}),  # what does not fit is passed over
        (1110, {"tiny", "small", "big"}),
        (9999, {"tiny", "small", "big", "harmless"}),
    ],
)
def test_as_many_as_fit_are_kept_the_most_rewarding_first(spare: float, kept: set[str]) -> None:
    assert choose_kept(MEASURED, spare) == kept


def test_a_measurement_reads_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    MEASURED.save(tmp_path / "sensitivity.json")
    assert Sensitivity.read(tmp_path / "sensitivity.json") == MEASURED
    for text in (
        "{",
        "[]",
        '{"errors": {"a": 1}}',
        '{"errors": {"a": 1}, "weights": {"b": 1}}',
        '{"errors": 1, "weights": 2}',
    ):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(RequestError, match=r"broken\.json"):
            Sensitivity.read(tmp_path / "broken.json")
