"""Draw docs/rag_timing.svg from results/rag_timing-*.json: mean times to first token, with p10 to p90.

python benchmarks/rag_chart.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from harness import RESULTS

CHART = Path(__file__).parents[1] / "docs" / "rag_timing.svg"
LEFT, WIDTH, BAR, GAP = 230, 420, 18, 40


def panel(title: str, rows: Sequence[Mapping[str, Any]], top: int) -> list[str]:
    """A bar a configuration, from `top` pixels down."""
    longest = max(row["cpu_seconds"]["p90"] for row in rows)
    lines = [f'<text x="{LEFT}" y="{top + 16}" font-weight="bold">{escape(title)}</text>']
    for at, row in enumerate(rows):
        y, times = top + 24 + at * BAR, row["cpu_seconds"]
        low, middle, high = (LEFT + WIDTH * times[name] / longest for name in ("p10", "mean", "p90"))
        color = (
            "#bbbbbb"
            if row["configuration"] == "no cache"
            else "#2f7d5b"
            if "order" in row["configuration"]
            else "#4c78a8"
        )
        lines += [
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(row["configuration"])}</text>',
            f'<rect x="{LEFT}" y="{y + 2}" width="{middle - LEFT:.1f}" height="{BAR - 4}" fill="{color}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + BAR / 2}" y2="{y + BAR / 2}" stroke="black"/>',
            f'<text x="{max(middle, high) + 6:.1f}" y="{y + 13}">{1000 * times["mean"]:.0f} ms</text>',
        ]
    return lines


def main() -> None:
    lines: list[str] = []
    top = 10
    for path in sorted(RESULTS.glob("rag_timing-[dl]*.json")):
        found = json.loads(path.read_text())
        kind = (
            "demo model, short documents"
            if "demo" in path.name
            else "SmolLM2-135M's shape, documents of 260 to 570 tokens"
        )
        title = f"{kind}: time to first token, pool {found['pool']:g} of the corpus"
        lines += panel(title, found["rows"], top)
        top += 24 + BAR * len(found["rows"]) + GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 90}" height="{top}" font-family="sans-serif"'
    )
    background = '<rect width="100%" height="100%" fill="white"/>'
    CHART.write_text("\n".join([f'{head} font-size="12">', background, *lines, "</svg>", ""]))
    print(CHART)


if __name__ == "__main__":
    main()
