"""One table of what was measured: our figures, and how many times better than each peer's they are.

Invariant: a ratio is taken within a round, where all servers did the same work in turn; the table shows the median of
the rounds' ratios and, in brackets, the lowest and the highest. Above 1 we are ahead, whatever the unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

Round = dict[str, list[float]]
"""A server's samples of one workload in one round, by measure."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measure of one workload. ours: the rounds' median; ratios: by peer, the rounds' lowest, median, highest."""

    workload: str
    measure: str
    ours: float
    ratios: dict[str, tuple[float, float, float]]


def compare(workload: str, found: dict[str, list[Round]], ours: str) -> list[Comparison]:
    """All measures of one workload; `found`: the rounds of each server. Measures in MB are figures, not ratios."""
    comparisons = []
    for measure in found[ours][0]:
        for name, point in _points(measure, [figures[measure] for figures in found[ours]]):
            own = [point(figures[measure]) for figures in found[ours]]
            ratios = {}
            for peer, rounds in found.items():
                if peer != ours and rounds:
                    theirs = [point(figures[measure]) for figures in rounds]
                    each = [_ratio(measure, a, b) for a, b in zip(own, theirs, strict=False)]  # the rounds of both
                    ratios[peer] = (min(each), median(each), max(each))
            comparisons.append(Comparison(workload, name, median(own), ratios))
    return comparisons


def rows(comparisons: Sequence[Comparison], peers: Sequence[str]) -> list[list[str]]:
    """Cells of the table: workload and measure, ours, and a peer a column."""
    found = []
    for each in comparisons:
        cells = [_cell(each.measure, each.ratios[peer]) if peer in each.ratios else "-" for peer in peers]
        found.append([f"{each.workload}: {each.measure}", _figure(each.ours), *cells])
    return found


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table as Markdown has it."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))


def _points(measure: str, rounds: Sequence[Sequence[float]]) -> list[tuple[str, Percentile]]:
    """The median, and where a round has samples enough to speak of it, the 99th percentile."""
    if all(len(samples) >= 8 for samples in rounds):
        return [(f"{measure}, p50", Percentile(50)), (f"{measure}, p99", Percentile(99))]
    return [(measure, Percentile(50))]


@dataclass(frozen=True, slots=True)
class Percentile:
    """A percentile of samples, interpolated between neighbours."""

    percent: int

    def __call__(self, samples: Sequence[float]) -> float:
        if len(samples) == 1:
            return samples[0]
        return quantiles(samples, n=100, method="inclusive")[self.percent - 1]


def _ratio(measure: str, ours: float, theirs: float) -> float:
    if "MB" in measure:
        return theirs
    return ours / theirs if "tokens/s" in measure else theirs / ours


def _cell(measure: str, spread: tuple[float, float, float]) -> str:
    low, middle, high = spread
    if "MB" in measure:
        return f"{_figure(middle)} MB"
    return f"{middle:.2f}" if low == high else f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _figure(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
