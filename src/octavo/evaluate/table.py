"""The table of a report: which numbers, in which words, and how far a column is from the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Difference = Literal["percent", "points", "none"]


def _number(digits: int, unit: str = "") -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}{unit and ' ' + unit}"


def _significant(value: float) -> str:
    return f"{value:.4g}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


@dataclass(frozen=True, slots=True)
class Row:
    """One number of every column."""

    key: str
    title: str
    show: Callable[[float], str]
    difference: Difference = "none"  # from the reference: in percent of it, in points of percent, or not at all


@dataclass(frozen=True, slots=True)
class Cell:
    """A column's number as it is shown; empty where it has none."""

    value: str
    difference: str


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table, ready to be shown."""

    title: str
    cells: Sequence[Cell]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows under one heading."""

    title: str
    lines: Sequence[Line]


def groups_of(report: Mapping[str, Any]) -> list[Group]:
    """The table of a report, from what `Comparison.to_json` gave; rows and groups without a number are left out."""
    columns = report["columns"]
    network = report["network"]["name"]
    # A score may be called CLIP score only where a CLIP model gave it.
    score = f"CLIP score ({network})" if network.startswith("CLIP ") else f"prompt score ({network})"
    layout = [
        (
            "In short",
            [
                Row("psnr", "PSNR at the same seed", _number(2, "dB")),
                Row("score", score, _number(2), "percent"),
                Row("fid", "FID to the reference set", _significant, "percent"),
                Row("right_all", "right in every respect (checker)", _share, "points"),
                Row("typography", "words read back", _share, "points"),
                Row("seconds", "seconds a picture", _significant, "percent"),
                Row("device_bytes", "peak device memory", _bytes, "percent"),
                Row("weight_bytes", "transformer's weights in memory", _bytes, "percent"),
            ],
        ),
        (
            f"Same seed, against {columns[0]['name']}",
            [
                Row("psnr_median", "PSNR, median", _number(2, "dB")),
                Row("psnr_worst", "PSNR, worst twentieth from", _number(2, "dB")),
                Row("psnr_pooled", "PSNR of the mean squared error", _number(2, "dB")),
                Row("ssim", "SSIM", _number(4)),
                Row("distance", report["distance"], _significant),
                Row("latent_error", "error of the final latents", _number(4)),
                Row("velocity", "error of the velocity", _number(4)),
            ],
        ),
        (
            "Right, by the checker",
            [
                Row(f"right_{name}", name, _share, "points")
                for name in ("background", "count", "colour", "shape", "place", "size")
            ],
        ),
        (
            f"As a set, by {report['network']['features']} features of {network}",
            [
                Row("fid_rise_low", "rise of FID, 5th percentile", _signed_share),
                Row("fid_rise_high", "rise of FID, 95th percentile", _signed_share),
                Row("cmmd", "CMMD to the reference set", _significant, "percent"),
                Row("fid_to_reference", f"FID to {columns[0]['name']}", _significant),
                Row("cmmd_to_reference", f"CMMD to {columns[0]['name']}", _significant),
                Row("fid_of_halves", "FID of odd to even pictures", _significant),
            ],
        ),
        (
            "Cost",
            [
                Row("evaluations_per_second", "steps a second", _significant, "percent"),
                Row("host_bytes", "peak host memory of the process", _bytes, "percent"),
                Row("fp8_share", "linear weights in FP8", _share),
            ],
        ),
    ]
    groups = []
    for title, rows in layout:
        lines = [line for row in rows if (line := _line(row, columns))]
        if lines:
            groups.append(Group(title, lines))
    return groups


def value_of(column: Mapping[str, Any], key: str) -> float | None:
    """A column's number by its key, wherever the report keeps it; None where it has none."""
    if key == "velocity":
        return None if column["velocity"] is None else float(column["velocity"]["whole"])
    for place in ("scores", "performance", "facts"):
        if key in column[place]:
            return float(column[place][key])
    return None


def _line(row: Row, columns: Sequence[Mapping[str, Any]]) -> Line | None:
    values = [value_of(column, row.key) for column in columns]
    if all(value is None for value in values):
        return None
    first = values[0]
    cells = [
        Cell(
            "" if value is None else row.show(value),
            "" if index == 0 or value is None or first is None else _difference(row.difference, value, first),
        )
        for index, value in enumerate(values)
    ]
    return Line(row.title, cells)


def _difference(kind: Difference, value: float, first: float) -> str:
    if kind == "points":
        return f"{_signed(100 * (value - first))} points"
    if kind == "percent" and first and math.isfinite(value / first):
        return _signed_share(value / first - 1)
    return ""


def _signed_share(value: float) -> str:
    return f"{_signed(100 * value)} %"


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "±0" if text in ("+0.0", "-0.0") else text
