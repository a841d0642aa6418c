"""The simulator's comparison: several set-ups over several traces, as numbers and as a table.

Invariant: all set-ups of a comparison see the same traces in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


def _names(figures: Sequence[Figure]) -> tuple[list[str], list[str]]:
    """The workloads and the set-ups, each once, in order of appearance."""
    return list(dict.fromkeys(f.workload for f in figures)), list(dict.fromkeys(f.setup for f in figures))
