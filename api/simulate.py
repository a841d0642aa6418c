"""`stemcache simulate`: what eviction policies and document orders would hit, on a trace or on synthetic workloads.

Invariant: no model and no torch; the same store, policies and orders as in the engine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stemcache.api.charts import BLUE, GREEN, GREY, Bar, draw_bars, require_charts
from stemcache.ragcache.simulate import Setup
from stemcache.ragcache.simulate_report import BOUNDS, SETUPS, Figure, as_json, compare, table
from stemcache.ragcache.simulate_trace import Trace, TraceError, read_trace
from stemcache.ragcache.simulate_workload import Workload


def simulate(options: argparse.Namespace) -> int:
    """Run the comparison, print it, write what was asked for. Raises StemcacheError, OSError."""
    if options.chart:
        require_charts(options.chart)
    workloads = _traces(options) if options.trace else _synthetic(options)
    setups = [*SETUPS, *_more_setups(options)]
    seeds = [0] if options.trace else options.seeds
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(workloads) * len(seeds) * len(setups) * _n_requests(workloads, options))
        figures = compare(
            workloads,
            seeds,
            capacity_tokens=options.capacity_tokens,
            chunk_tokens=options.chunk_tokens,
            setups=setups,
            on_request=lambda: progress.advance(task),
        )
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps({"figures": as_json(figures)}, indent=2) + "\n")
    if options.chart:
        draw_rates(figures, options.chart)
    return 0


def draw_rates(figures: Sequence[Figure], path: Path) -> None:
    """Document hit rates: a block a workload, a bar a set-up, a whisker the deviation over seeds."""
    panels: dict[str, list[Bar]] = {}
    for figure in figures:
        rates, setup = figure.document_rates, figure.setup
        rate, spread = mean(rates), stdev(rates) if len(rates) > 1 else 0.0
        color = GREY if setup in BOUNDS else GREEN if "cache order" in setup else BLUE
        bar = Bar(setup, rate, rate - spread, rate + spread, f"{rate:.3f}", color)
        panels.setdefault(f"{figure.workload}: documents hit", []).append(bar)
    draw_bars(panels, path)


def _traces(options: argparse.Namespace) -> dict[str, Callable[[int], Trace]]:
    try:
        with options.trace.open(encoding="utf-8") as lines:
            trace = read_trace(options.trace.name, lines)
    except UnicodeDecodeError as error:
        raise TraceError(f"{options.trace} is no text: {error}") from error
    return {trace.name: lambda seed: trace}


def _synthetic(options: argparse.Namespace) -> dict[str, Callable[[int], Trace]]:
    """Each k, static and with the popular documents changing six times."""
    workloads: dict[str, Callable[[int], Trace]] = {}
    for k in options.k:
        for kind, drift_every in (("static", 0), ("drift", max(1, options.requests // 6))):
            try:
                workload = Workload(
                    k=k,
                    n_requests=options.requests,
                    n_documents=options.documents,
                    drift_every=drift_every,
                    drift_top=options.documents // 10,
                    drift_replaced=options.documents // 50,
                )
            except ValueError as error:
                raise TraceError(f"no such workload: {error}") from error
            workloads[f"k={k}, {kind}"] = workload.draw
    return workloads


def _more_setups(options: argparse.Namespace) -> list[Setup]:
    more = []
    if options.max_shift:
        more.append(Setup("pgdsf+gate", order="cache", max_shift=options.max_shift))
    if options.backlog:
        more += [Setup("pgdsf+gate", queue=queue, backlog=options.backlog) for queue in ("fcfs", "cache")]
    return more


def _n_requests(workloads: dict[str, Callable[[int], Trace]], options: argparse.Namespace) -> int:
    return len(next(iter(workloads.values()))(0).requests) if options.trace else int(options.requests)


def _print(figures: list[Figure]) -> None:
    header, rows = table(figures)
    shown = Table(box=None)
    for index, title in enumerate(header):
        shown.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    width = 200  # also into a pipe; a narrower terminal wraps its lines itself
    Console(width=width).print(shown)
