"""The simulator's comparison: several set-ups over several traces, as numbers, a table and a chart.

Invariant: all set-ups of a comparison see the same traces in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import mean, stdev
from typing import Any, Final

from stemcache.ragcache.simulate import HitRates, Setup, Simulation
from stemcache.ragcache.simulate_bounds import belady, order_free
from stemcache.ragcache.simulate_trace import Trace

SETUPS: Final = (
    Setup("lru"),
    Setup("lfu"),
    Setup("perfect lfu"),
    Setup("pgdsf"),
    Setup("pgdsf+gate"),
    Setup("lru", order="cache"),
    Setup("pgdsf+gate", order="cache"),
)
BOUNDS: Final = {"bound, relevance order (Belady)": belady, "bound, any order": order_free}


@dataclass(frozen=True, slots=True)
class Figure:
    """One set-up on one workload: the rates of each seed."""

    setup: str
    workload: str
    document_rates: tuple[float, ...]
    token_rates: tuple[float, ...]


def compare(
    workloads: Mapping[str, Callable[[int], Trace]],
    seeds: Sequence[int],
    *,
    capacity_tokens: int,
    chunk_tokens: int,
    setups: Sequence[Setup] = SETUPS,
    on_request: Callable[[], object] = lambda: None,
) -> list[Figure]:
    """Run every set-up on every workload and seed. `on_request` is called after each request of each set-up."""
    found: list[Figure] = []

    def enter(setup: str, workload: str, rates: HitRates) -> None:
        found.append(Figure(setup, workload, (rates.document_rate,), (rates.token_rate,)))

    for workload, draw in workloads.items():
        for seed in seeds:
            trace = draw(seed)
            for setup in setups:
                simulation = Simulation(trace, setup, capacity_tokens=capacity_tokens, chunk_tokens=chunk_tokens)
                enter(setup.name, workload, simulation.run(on_request))
            for name, bound in BOUNDS.items():
                enter(name, workload, bound(trace, capacity_tokens=capacity_tokens, chunk_tokens=chunk_tokens))
    return merge(found)


def merge(figures: Sequence[Figure]) -> list[Figure]:
    """Put the rates of one set-up on one workload together, in the order of the figures given."""
    together: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        together.setdefault((figure.setup, figure.workload), []).append(figure)
    return [
        Figure(
            setup,
            workload,
            tuple(rate for figure in each for rate in figure.document_rates),
            tuple(rate for figure in each for rate in figure.token_rates),
        )
        for (setup, workload), each in together.items()
    ]


def table(figures: Sequence[Figure], baseline: str = "lru") -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row a set-up, a column a workload; document hit rate, deviation over seeds, times baseline."""
    workloads, setups = _names(figures)
    found = {(figure.setup, figure.workload): figure for figure in figures}
    rows = []
    for setup in setups:
        row = [setup]
        for workload in workloads:
            rates = found[setup, workload].document_rates
            base = mean(found[baseline, workload].document_rates)
            spread = f" ±{stdev(rates):.3f}" if len(rates) > 1 else ""
            times = f"{mean(rates) / base:.2f}x" if base else "-"
            row += [f"{mean(rates):.3f}{spread}", times, f"{mean(found[setup, workload].token_rates):.3f}"]
        rows.append(row)
    header = ["set-up"] + [each for workload in workloads for each in (workload, "of LRU's", "tokens")]
    return header, rows


def as_json(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """The figures as plain data."""
    return [
        {
            "setup": figure.setup,
            "workload": figure.workload,
            "document_rates": [round(rate, 5) for rate in figure.document_rates],
            "token_rates": [round(rate, 5) for rate in figure.token_rates],
        }
        for figure in figures
    ]


def chart(figures: Sequence[Figure]) -> str:
    """An SVG of the document hit rates: a block a workload, a bar a set-up, a whisker the deviation over seeds."""
    workloads, setups = _names(figures)
    found = {(figure.setup, figure.workload): figure for figure in figures}
    left, width, bar, gap = 230, 420, 16, 34
    height = len(workloads) * (len(setups) * bar + gap) + 10
    longest = max([rate for figure in figures for rate in figure.document_rates] + [0.01])
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    y = 20
    for workload in workloads:
        lines.append(f'<text x="{left}" y="{y}" font-weight="bold">{escape(workload)}: documents hit</text>')
        y += 6
        for setup in setups:
            rates = found[setup, workload].document_rates
            scale, middle = width / longest, y + bar / 2
            spread = stdev(rates) if len(rates) > 1 else 0.0
            end = left + mean(rates) * scale
            color = "#bbbbbb" if setup in BOUNDS else "#2f7d5b" if "cache order" in setup else "#4c78a8"
            lines += [
                f'<text x="{left - 8}" y="{middle + 4}" text-anchor="end">{escape(setup)}</text>',
                f'<rect x="{left}" y="{y + 2}" width="{end - left:.1f}" height="{bar - 4}" fill="{color}"/>',
                f'<line x1="{end - spread * scale:.1f}" x2="{end + spread * scale:.1f}" y1="{middle}" y2="{middle}" '
                f'stroke="black"/>',
                f'<text x="{end + spread * scale + 5:.1f}" y="{middle + 4}">{mean(rates):.3f}</text>',
            ]
            y += bar
        y += gap - 6
    return "\n".join([*lines, "</svg>", ""])


def _names(figures: Sequence[Figure]) -> tuple[list[str], list[str]]:
    """The workloads and the set-ups, each once, in order of appearance."""
    return list(dict.fromkeys(f.workload for f in figures)), list(dict.fromkeys(f.setup for f in figures))
