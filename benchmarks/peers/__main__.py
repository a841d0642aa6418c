"""Starts every installed peer beside ours, gives all the same requests in turns, and prints one table of ratios.

    make peers-install peers
    python -m peers [--quick] [--only stemcache vllm] [--workloads restart] [--rounds 3] [--dtype bfloat16]

from benchmarks/. Writes results/peers.json unless it is quick. While one server works the
others are stopped by a signal, so the machine is each one's alone; other people's work on it shows in the spreads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import RESULTS, table, write_results
from shapes import SMOLLM2_135M

from peers.checkpoint import TINY, write_checkpoint
from peers.commands import INSTALLED, OURS, PEERS, Peer, Settings
from peers.drive import AnswerError, Client
from peers.report import Round, compare, rows
from peers.server import Server, ServerError
from peers.workloads import QUICK, WORKLOADS, Sizes, Workload

Found = dict[str, dict[str, list[Round]]]
"""Rounds by workload and server."""


@dataclass(slots=True)
class Contestant:
    """A peer and its running server. `peak_bytes`: the most memory that it held, by the end of any round."""

    peer: Peer
    server: Server
    model: str
    peak_bytes: int = 0

    async def run(self, workload: Workload, round_: int, sizes: Sizes) -> Round:
        """One round of a workload, with the machine to itself. Raises AnswerError, ServerError."""
        rng = random.Random(f"{workload.name} {round_}")
        self.server.resume()
        try:
            async with Client(self.server.url, self.model, honours_n=self.peer.honours_n) as client:
                return await workload.run(client, self.server, rng, sizes)
        finally:
            self.peak_bytes = max(self.peak_bytes, self.server.peak_bytes())
            self.server.pause()


def settings_of(options: argparse.Namespace, cold: Path) -> Settings:
    """The checkpoint, written if it is not there yet, and what fits beside it."""
    name, shape = ("tiny", TINY) if options.quick else ("SmolLM2-135M", SMOLLM2_135M)
    folder = INSTALLED / "checkpoints" / f"{name}-{options.dtype}"
    shape_of: dict[str, Any] = dict(shape)
    per_token = 2 * shape_of["num_hidden_layers"] * shape_of["num_key_value_heads"] * shape_of["head_dim"]
    return Settings(
        checkpoint=write_checkpoint(folder, dtype=options.dtype, shape=shape_of),
        dtype=options.dtype,
        tokens=min(options.kv_tokens, 16_384) if options.quick else options.kv_tokens,
        bytes_per_token=per_token * (2 if options.dtype == "bfloat16" else 4),
        context=2_048 if options.quick else 4_096,
        cold=cold,
    )


def start(stack: ExitStack, names: Sequence[str], settings: Settings) -> list[Contestant]:
    """Start those that are installed, one after the other, and leave each paused."""
    started = []
    for name in names:
        peer = PEERS[name]
        if not peer.is_installed:
            print(
                f"{name} is left out: {peer.program} is not there; `make peers-install` tries to install it", flush=True
            )
            continue
        server = stack.enter_context(peer.server(settings))
        try:
            seconds = server.start()
        except ServerError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        print(f"{name} {peer.version()} was ready after {seconds:.1f} s", flush=True)
        server.pause()
        started.append(Contestant(peer, server, peer.model(settings)))
    return started


async def run(
    contestants: Sequence[Contestant],
    workloads: Sequence[Workload],
    rounds: int,
    sizes: Sizes,
    save: Callable[[Found], None],
) -> Found:
    """All rounds of all workloads, saved after each. A server that fails at a workload is left out of it."""
    found: Found = {workload.name: {each.peer.name: [] for each in contestants} for workload in workloads}
    for round_ in range(rounds):
        for workload in [each for each in workloads if not each.once or round_ == rounds - 1]:
            for each in [each for each in contestants if each.peer.name in found[workload.name]]:
                print(f"round {round_ + 1}, {workload.name}: {each.peer.name}", flush=True)
                try:
                    found[workload.name][each.peer.name].append(await each.run(workload, round_, sizes))
                except (AnswerError, ServerError, OSError) as error:
                    print(f"{each.peer.name} fails at {workload.name}: {error}", flush=True)
                    del found[workload.name][each.peer.name]
            save(found)
    return found


def report(found: Found, ours: str) -> str:
    """The table. Without ours there is nothing to compare with."""
    comparisons = [
        each for name, servers in found.items() if servers.get(ours) for each in compare(name, servers, ours)
    ]
    peers = list(dict.fromkeys(peer for each in comparisons for peer in each.ratios))
    return table(["workload: measure", ours, *peers], rows(comparisons, peers))


def main(arguments: Sequence[str] | None = None) -> Found:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few requests; writes nothing")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="PEER")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-tokens", type=int, default=86_016, help="keys and values that each holds (%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--report", action="store_true", help="print the table of results/peers.json, and run nothing")
    options = parser.parse_args(arguments)
    if options.report:
        saved = json.loads((RESULTS / "peers.json").read_text())
        print(report(saved["rounds"], OURS.name))
        return dict(saved["rounds"])
    workloads = [WORKLOADS[name] for name in options.workloads]
    sizes = QUICK if options.quick else Sizes()
    with ExitStack() as stack:
        cold = stack.enter_context(tempfile.TemporaryDirectory(prefix="stemcache-cold-"))
        settings = settings_of(options, Path(cold))
        contestants = start(stack, options.only, settings)
        versions = {each.peer.name: each.peer.version() for each in contestants}

        def save(found: Found) -> None:
            if not options.quick:
                peaks = {each.peer.name: each.peak_bytes / 1e6 for each in contestants}
                payload = {"dtype": options.dtype, "sizes": asdict(sizes), "versions": versions, "peak_mb": peaks}
                write_results("peers", {**payload, "kv_tokens": settings.tokens, "rounds": found})

        found = asyncio.run(run(contestants, workloads, options.rounds, sizes, save))
        if OURS in [each.peer for each in contestants]:
            print(report(found, OURS.name))
        print("peak memory, MB: " + ", ".join(f"{each.peer.name} {each.peak_bytes / 1e6:.0f}" for each in contestants))
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the servers end, too
    main()
