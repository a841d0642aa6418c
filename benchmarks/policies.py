"""Eviction policies and document orders on the workloads of docs/policies.md: five seeds, 6,000 requests each.

    python benchmarks/policies.py [--quick] [--processes 2]

Prints the table, writes results/policies.json and draws docs/policies.svg. A busy machine changes no hit rate.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

from harness import table as text_table
from harness import write_results

from stemcache.api.simulate import draw_rates
from stemcache.ragcache.simulate_report import Figure, as_json, compare, merge, table
from stemcache.ragcache.simulate_workload import Workload

SEEDS = (7, 11, 23, 42, 99)
CAPACITY_TOKENS = 1_050_000  # 128 GiB of Mistral-7B's keys and values
CHUNK_TOKENS = 512
CHART = Path(__file__).parents[1] / "docs" / "policies.svg"


def workload(k: int, drift: bool, quick: bool) -> Workload:
    return Workload(k=k, drift_every=1_000 if drift else 0, n_requests=500 if quick else 6_000)


def run(task: tuple[int, int, bool, bool]) -> list[Figure]:
    seed, k, drift, quick = task
    name = f"k={k}, {'drift' if drift else 'static'}"
    return compare(
        {name: workload(k, drift, quick).draw}, [seed], capacity_tokens=CAPACITY_TOKENS, chunk_tokens=CHUNK_TOKENS
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="500 requests, two seeds; writes nothing")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    tasks = list(product(SEEDS[:2] if options.quick else SEEDS, (2, 5), (False, True), (options.quick,)))
    found: list[Figure] = []
    with ProcessPoolExecutor(options.processes) as pool:
        for done, figures in enumerate(pool.map(run, tasks), 1):
            found += figures
            print(f"{done} of {len(tasks)} runs done", flush=True)
    figures = merge(found)
    print(text_table(*table(figures)))
    if options.quick:
        return
    draw_rates(figures, CHART)
    settings = {"seeds": SEEDS, "capacity_tokens": CAPACITY_TOKENS, "chunk_tokens": CHUNK_TOKENS}
    print(write_results("policies", {**settings, "figures": as_json(figures)}))


if __name__ == "__main__":
    main()
