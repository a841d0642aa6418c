"""What every benchmark shares: interleaved timing, the record of the machine, tables and JSON.

Invariant: figures that are compared were taken in one interleaved run, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call over the repeats: median, minimum and maximum."""

    median: float
    low: float
    high: float


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time the functions in turn, `repeats` times round, after `warmup` untimed rounds.

    clock: seconds; `time.process_time` leaves out what other processes took, for work on one thread only.
    """
    samples = interleaved_samples(functions, repeats=repeats, warmup=warmup, clock=clock)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in samples.items()}


def interleaved_samples(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """As `interleave`, but all seconds, round by round: for ratios within a round."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            begin = clock()
            function()
            elapsed = clock() - begin
            if turn >= warmup:
                samples[name].append(elapsed)
    return samples


# What a benchmark, or the one before it, has written is no change of what is measured.
_NOT_RESULTS = ":(top,exclude)benchmarks/results"


def record() -> dict[str, Any]:
    """Where and with what the figures were taken: CPU, cores, load, library versions, commit."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "numpy", "numba", "triton")},
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no", ":(top)", _NOT_RESULTS)),
    }


def write_results(name: str, payload: Mapping[str, Any]) -> Path:
    """Write `payload` with the machine's record to results/<name>.json. Returns the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": record(), **payload}, indent=2) + "\n")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain text table: first column left, the others right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    run = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None
