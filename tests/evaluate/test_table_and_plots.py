"""What a report says is what was measured: values, differences in the right unit, lines at the right height."""

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from octavo.evaluate.plots import BOTTOM, TOP, Series, line_chart
from octavo.evaluate.table import groups_of


def report(**second: float) -> dict[str, Any]:
    def column(name: str, values: dict[str, float], seconds: float) -> dict[str, Any]:
        return {"name": name, "scores": values, "performance": {"seconds": seconds}, "facts": {}, "velocity": None}

    first = {"pictures": 9, "score": 32.0, "fid": 12.5, "right_all": 0.98}
    return {
        "network": {"name": "CLIP some/model", "features": 768},
        "distance": "LPIPS (AlexNet)",
        "columns": [column("16-bit", first, 2.0), column("FP8", {**first, **second}, 1.0)],
    }


def cells(title: str, **second: float) -> list[tuple[str, str]]:
    lines = [line for group in groups_of(report(**second)) for line in group.lines if line.title == title]
    assert len(lines) == 1
    return [(cell.value, cell.difference) for cell in lines[0].cells]


def test_scores_differ_in_percent_and_shares_in_points() -> None:
    assert cells("CLIP score (CLIP some/model)", score=31.68) == [("32.00", ""), ("31.68", "-1.0 %")]
    assert cells("FID to the reference set", fid=13.0) == [("12.5", ""), ("13", "+4.0 %")]
    assert cells("right in every respect (checker)", right_all=0.975) == [("98.0 %", ""), ("97.5 %", "-0.5 points")]
    assert cells("seconds a picture") == [("2", ""), ("1", "-50.0 %")]
    assert cells("FID to the reference set") == [("12.5", ""), ("12.5", "±0 %")]


def test_a_column_without_a_number_has_an_empty_cell_and_rows_without_any_are_left_out() -> None:
    assert cells("PSNR at the same seed", psnr=41.234) == [("", ""), ("41.23 dB", "")]
    titles = [line.title for group in groups_of(report()) for line in group.lines]
    assert "SSIM" not in titles
    assert "words read back" not in titles


def heights(svg: str) -> list[list[float]]:
    return [
        [float(point.split(",")[1]) for point in points.split()]
        for points in re.findall(r'polyline points="([^"]*)"', svg)
    ]


def test_lines_lie_on_a_logarithmic_scale_between_the_bounds() -> None:
    svg = line_chart("t", "x", [Series("a", (1, 2, 3), (0.01, 0.1, 1.0))])
    ElementTree.fromstring(svg)
    ((low, middle, high),) = heights(svg)
    assert (low, high) == (BOTTOM, TOP)
    assert middle == pytest.approx((low + high) / 2)
    assert "1 %" in svg
    assert "100 %" in svg


def test_points_without_a_logarithm_are_left_out_and_names_are_escaped() -> None:
    svg = line_chart("a < b", "x", [Series("<&>", (1, 2, 3), (0.0, 0.1, 0.2))])
    ElementTree.fromstring(svg)
    assert len(heights(svg)[0]) == 2
    nothing = line_chart("t", "x", [Series("a", (1,), (0.0,))])
    assert "All errors are zero" in nothing


@pytest.mark.parametrize("values", [(0.05,), (0.03, 0.030001), (1e-7, 3.0)])
def test_any_range_has_ticks_around_it(values: tuple[float, ...]) -> None:
    svg = line_chart("t", "x", [Series("a", tuple(range(len(values))), values)])
    ElementTree.fromstring(svg)
    assert svg.count('class="grid"') >= 2
    assert all(TOP - 0.1 <= y <= BOTTOM + 0.1 for line in heights(svg) for y in line)
