"""A line chart on two logarithmic axes, as SVG: how a cost grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 380, 250, 70, 45, 30
LEGEND = 150
COLORS = ("#4c78a8", "#2f7d5b", "#e45756", "#b07aa1", "#f2a541")


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram. lines: by name, points (x, y), all above 0."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def draw(panels: Sequence[Panel]) -> str:
    """The panels side by side, as an SVG document."""
    width = LEFT + WIDTH + LEGEND
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(panels)}" height="{TOP + HEIGHT + BOTTOM}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, panel in enumerate(panels):
        lines += [f'<g transform="translate({i * width} 0)">', *_panel(panel), "</g>"]
    return "\n".join([*lines, "</svg>", ""])


def _panel(panel: Panel) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    x_low, x_high = _decades([x for x, _ in points])
    y_low, y_high = _decades([y for _, y in points])

    def at_x(x: float) -> float:
        return LEFT + WIDTH * (math.log10(x) - x_low) / (x_high - x_low)

    def at_y(y: float) -> float:
        return TOP + HEIGHT * (y_high - math.log10(y)) / (y_high - y_low)

    lines = [f'<text x="{LEFT}" y="18" font-weight="bold">{escape(panel.title)}</text>']
    for power in range(x_low, x_high + 1):
        x = at_x(10**power)
        lines += [
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + HEIGHT}" stroke="#dddddd"/>',
            f'<text x="{x:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{10**power:,}</text>',
        ]
    for power in range(y_low, y_high + 1):
        y = at_y(10.0**power)
        lines += [
            f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>',
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>',
        ]
    middle = TOP + HEIGHT / 2
    lines += [
        f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 36}" text-anchor="middle">{escape(panel.x)}</text>',
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(panel.y)}</text>',
    ]
    for i, (name, line) in enumerate(panel.lines.items()):
        color = COLORS[i % len(COLORS)]
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line)
        key = TOP + 12 + 18 * i
        lines += [
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>',
            f'<line x1="{LEFT + WIDTH + 10}" x2="{LEFT + WIDTH + 28}" y1="{key - 4}" y2="{key - 4}" '
            f'stroke="{color}" stroke-width="2"/>',
            f'<text x="{LEFT + WIDTH + 33}" y="{key}">{escape(name)}</text>',
        ]
    return lines


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten around them, at least one decade."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)
