"""Draw docs/rag_timing.svg from results/rag_timing-*.json: mean times to first token, with p10 to p90.

python benchmarks/rag_chart.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import RESULTS

from stemcache.api.charts import BLUE, GREEN, GREY, Bar, draw_bars

CHART = Path(__file__).parents[1] / "docs" / "rag_timing.svg"
KINDS = {
    "demo": "demo model, short documents",
    "long": "SmolLM2-135M's shape, documents of 260 to 570 tokens",
}


def bar(row: Mapping[str, Any]) -> Bar:
    """One configuration, in milliseconds of processor time."""
    name = row["configuration"]
    low, mean, high = (1000 * row["cpu_seconds"][each] for each in ("p10", "mean", "p90"))
    color = GREY if name == "no cache" else GREEN if "order" in name else BLUE
    return Bar(name, mean, low, high, f"{mean:.0f} ms", color)


def main() -> None:
    panels = {}
    for kind, what in KINDS.items():
        for path in sorted(RESULTS.glob(f"rag_timing-{kind}-*.json")):
            found = json.loads(path.read_text())
            title = f"{what}: first token, pool {found['pool']:g} of the corpus"
            panels[title] = [bar(row) for row in found["rows"]]
    draw_bars(panels, CHART)
    print(CHART)


if __name__ == "__main__":
    main()
