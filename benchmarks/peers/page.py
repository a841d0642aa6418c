"""What was measured as text: the section of docs/peers.md that a run gives."""

from __future__ import annotations

from peers.commands import OURS
from peers.measured import Measured
from peers.report import Comparison, compare, markdown_table, rows
from peers.workloads import WORKLOADS


def markdown(measured: Measured) -> str:
    """Settings, the table, what failed, memory and start-up."""
    machine, setup = measured.machine, measured.setup
    versions = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    parts = [
        f"{setup['shape']}, {setup['dtype']}; {versions}; {setup['kv_tokens']:,} tokens of keys and values; "
        f"{machine['cores']} cores of {machine['cpu']}, load average {machine['load_average'][0]} at the start, "
        f"{machine['date'][:10]}, commit {(machine['commit'] or 'unknown')[:9]}; {_rounds(measured)}.",
        _table(_comparisons(measured)),
        *(
            f"{server} failed at {workload}: {reason}"
            for workload, servers in measured.failures.items()
            for server, reason in servers.items()
        ),
        "Peak memory in MB: " + _figures(measured.peak_mb) + ".",
        "Seconds from the first start to ready: " + _figures(measured.ready_seconds) + ".",
    ]
    return "\n\n".join(parts)


def _comparisons(measured: Measured) -> list[Comparison]:
    """Without our own rounds of a workload there is nothing to compare with."""
    return [
        each
        for name, servers in measured.rounds.items()
        if servers.get(WORKLOADS[name].ours)
        for each in compare(name, servers, WORKLOADS[name].ours)
    ]


def _table(comparisons: list[Comparison]) -> str:
    peers = list(dict.fromkeys(peer for each in comparisons for peer in each.ratios))
    return markdown_table(["workload: measure", OURS.name, *peers], rows(comparisons, peers))


def _rounds(measured: Measured) -> str:
    """How many there were of what."""
    by_count: dict[int, list[str]] = {}
    for workload, servers in measured.rounds.items():
        by_count.setdefault(len(servers.get(WORKLOADS[workload].ours, ())), []).append(workload)
    most = max(by_count, default=0)
    others = [f"{count} of {', '.join(names)}" for count, names in by_count.items() if count != most]
    return f"rounds: {most}" + (f" ({'; '.join(others)})" if others else "")


def _figures(by_server: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f}" for name, value in by_server.items())
