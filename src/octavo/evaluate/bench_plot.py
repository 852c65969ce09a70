"""One picture of a run of benchmarks: for each time a bar as long as its share of the measured ceiling, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from octavo.evaluate.plots import INKS, STYLE

WIDTH, LEFT, RIGHT = 760, 300, 640  # of the picture and of the bars' field
TOP, ROW = 54, 22
PEER_INK, OUR_INK = INKS[7], INKS[0]
MOST = 80  # bars: a longer picture is read by nobody


def bar_chart(title: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines of `bench_results` that have a fraction, as bars with their median beside; as one <svg> element.

    A full bar is the device's measured ceiling. Lines of peers, whose names say so, are grey.
    """
    shown = [line for line in lines if "fraction" in line][:MOST]
    height = TOP + ROW * max(1, len(shown)) + 20
    parts = [f'<text class="title" x="16" y="22">{escape(title)}</text>']
    if not shown:
        parts.append(f'<text x="16" y="{TOP}">No line of this run has a ceiling to be held against.</text>')
    else:
        for share in (0, 0.25, 0.5, 0.75, 1):
            x = _along(share)
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP - 8}" y2="{height - 14}"/>')
            parts.append(f'<text x="{x}" y="{TOP - 12}" text-anchor="middle">{share:.0%}</text>')
    for index, line in enumerate(shown):
        y = TOP + index * ROW
        ink = PEER_INK if "diffusers" in line["name"] else OUR_INK
        end = _along(min(1.2, line["fraction"]))
        label = f"{human(line['median'], line['unit'])}, {line['fraction']:.0%}"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(line["name"])}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y + 2}" width="{max(1.0, end - LEFT):.1f}" height="15" fill="{ink}"/>')
        parts.append(f'<text x="{end + 6:.1f}" y="{y + 13}">{escape(label)}</text>')
    return (
        f'<svg class="octavo-chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>{"".join(parts)}</svg>'
    )


def human(value: float, unit: str) -> str:
    """A figure with a unit that fits its size: 0.0012 s is 1.2 ms."""
    if unit == "s" and value < 1:
        return f"{value * 1e6:.3g} µs" if value < 1e-3 else f"{value * 1e3:.3g} ms"
    if unit == "B":
        return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
    if unit == "FLOP/s" and value >= 1e12:
        return f"{value / 1e12:.4g} TFLOP/s"
    if unit in ("FLOP/s", "B/s"):
        return f"{value / 1e9:.4g} G{unit}"
    return f"{value:.3g}×" if unit == "x" else f"{value:.3g} {unit}"


def _along(share: float) -> float:
    return LEFT + share * (RIGHT - LEFT)
