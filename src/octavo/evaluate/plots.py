"""Line charts as SVG, by hand: small, sharp on a phone, and in the reader's colours, light or dark.

The same text stands inside an HTML page and as a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 340
LEFT, TOP, RIGHT, BOTTOM = 64, 34, 624, 268  # of the plot's field
LEGEND_LINE = 18

# Told apart in both schemes, and by people who tell red from green with difficulty (Okabe and Ito 2008).
INKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")

STYLE = """
.octavo-chart text { font: 12px system-ui, sans-serif; fill: #333 }
.octavo-chart .title { font-size: 14px; font-weight: 600 }
.octavo-chart .grid { stroke: #8884; stroke-width: 1 }
@media (prefers-color-scheme: dark) { .octavo-chart text { fill: #ddd } }
"""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    x: Sequence[int]  # steps or blocks, counted
    y: Sequence[float]
    ink: int = 0  # number of the colour; a model keeps its own
    dashed: bool = False


def line_chart(title: str, x_label: str, series: Sequence[Series], *, percent: bool = True) -> str:
    """A chart of positive numbers on a logarithmic scale, as one <svg> element.

    Args:
        title: above the chart.
        x_label: below its axis.
        series: lines; points that are zero, which no logarithm has, are left out.
        percent: whether y is a share, shown in percent.
    """
    points = [(x, y) for each in series for x, y in zip(each.x, each.y, strict=True) if y > 0 and math.isfinite(y)]
    if not points:
        return _svg(title, f'<text x="{LEFT}" y="{TOP + 30}">All errors are zero.</text>', 0)
    low, high = _decades([y for _, y in points])
    first, last = float(min(x for x, _ in points)), float(max(x for x, _ in points))
    if first == last:
        first, last = first - 0.5, last + 0.5

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - first) / (last - first)
        up = (math.log10(y) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return LEFT + along * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    parts = []
    for tick in _log_ticks(low, high):
        _, y = place(first, tick)
        label = f"{tick * 100:.3g} %" if percent else f"{tick:.3g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in _ticks(first, last):
        x, _ = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{tick:.3g}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 34}" text-anchor="middle">{escape(x_label)}</text>')
    for index, each in enumerate(series):
        ink, dash = INKS[each.ink % len(INKS)], ' stroke-dasharray="6 4"' if each.dashed else ""
        spots = [place(x, y) for x, y in zip(each.x, each.y, strict=True) if y > 0 and math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="2"{dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{ink}"/>' for x, y in spots]
        row = BOTTOM + 56 + index * LEGEND_LINE
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + 22}" y1="{row - 4}" y2="{row - 4}" stroke="{ink}" stroke-width="3"{dash}/>'
        )
        parts.append(f'<text x="{LEFT + 30}" y="{row}">{escape(each.name)}</text>')
    return _svg(title, "".join(parts), len(series))


def _svg(title: str, inside: str, lines: int) -> str:
    height = HEIGHT + max(0, lines - 1) * LEGEND_LINE
    return (
        f'<svg class="octavo-chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>{inside}</svg>'
    )


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Bounds around `values` that lie on ticks: 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    under = [tick for tick in _steps(low / 10, low) if tick <= low * 1.0001]
    over = [tick for tick in _steps(high, high * 10) if tick >= high * 0.9999]
    bottom, top = max(under), min(over)
    return (bottom, top) if top > bottom else (bottom / 2, top * 2)


def _steps(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Ticks between the bounds; of many decades only whole ones."""
    ticks = [tick for tick in _steps(low, high) if low * 0.999 <= tick <= high * 1.001]
    return ticks if len(ticks) <= 8 else ticks[:: math.ceil(len(ticks) / 8)]


def _ticks(first: float, last: float) -> list[float]:
    """Round whole numbers, about six, within the bounds."""
    rough = max(1.0, (last - first) / 6)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * digit for digit in (1, 2, 5, 10) if size * digit >= rough)
    count = math.floor((last - first) / step + 1e-9)
    start = math.ceil(first / step - 1e-9) * step
    return [start + i * step for i in range(count + 1) if start + i * step <= last * (1 + 1e-9) + 1e-12]
