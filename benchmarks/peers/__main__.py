"""Starts every installed peer beside ours, gives all the same requests in turns, and prints one table of ratios.

    make peers-install peers
    python -m peers [--quick] [--only stemcache vllm] [--workloads restart] [--rounds 3] [--dtype bfloat16]
    python -m peers --shape qwen3-0.6b --kv-tokens 16384 --only stemcache transformers vllm
    python -m peers --resume        goes on with a run that was broken off, or that lacks a server
    python -m peers report          the table of the last run, as Markdown

from benchmarks/. Writes results/peers-<shape>-<dtype>.json after every turn unless it is quick. While one server works
the others are stopped by a signal, so the machine is each one's alone; other people's work on it shows in the spreads.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shapes import QWEN3_06B, SMOLLM2_135M

from peers.checkpoint import TINY, write_checkpoint
from peers.commands import INSTALLED, PEERS, Settings
from peers.contest import Contest, start
from peers.measured import Measured, SavedRunError
from peers.page import markdown
from peers.workloads import QUICK, WORKLOADS, Sizes

SHAPES: dict[str, dict[str, Any]] = {"smollm2-135m": SMOLLM2_135M, "qwen3-0.6b": QWEN3_06B, "tiny": TINY}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few requests; writes nothing")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="SERVER")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="then no second or third round begins (%(default)s)")
    parser.add_argument("--kv-tokens", type=int, default=86_016, help="keys and values that each holds (%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m", help="of the model (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the last run of that shape and dtype")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape = "tiny"
    return options


def settings_of(options: argparse.Namespace, cold: Path) -> Settings:
    """The checkpoint, written if it is not there yet, and what fits beside it."""
    shape = SHAPES[options.shape]
    folder = INSTALLED / "checkpoints" / f"{options.shape}-{options.dtype}"
    per_token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return Settings(
        checkpoint=write_checkpoint(folder, dtype=options.dtype, shape=shape),
        dtype=options.dtype,
        tokens=min(options.kv_tokens, 16_384) if options.quick else options.kv_tokens,
        bytes_per_token=per_token * (2 if options.dtype == "bfloat16" else 4),
        context=2_048 if options.quick else 4_096,
        cold=cold,
    )


async def run(options: argparse.Namespace) -> Measured:
    """Start, measure, report. Raises SavedRunError."""
    sizes = QUICK if options.quick else Sizes()
    with ExitStack() as stack:
        cold = stack.enter_context(tempfile.TemporaryDirectory(prefix="stemcache-cold-"))
        settings = settings_of(options, Path(cold))
        setup = {"shape": options.shape, "dtype": options.dtype, "sizes": asdict(sizes), "kv_tokens": settings.tokens}
        measured = Measured.load(options.shape, options.dtype) if options.resume else Measured(setup)
        measured.require_setup(setup)
        save = (lambda: None) if options.quick else measured.save
        contest = Contest([], measured, sizes, options.rounds, options.minutes, save)  # its clock runs from here
        contest.contestants += await start(stack, [PEERS[name] for name in options.only], settings, measured)
        await contest.run([WORKLOADS[name] for name in options.workloads])
    return measured


def main(arguments: Sequence[str] | None = None) -> Measured:
    options = parsed(arguments)
    try:
        saved = options.action == "report"
        measured = Measured.load(options.shape, options.dtype) if saved else asyncio.run(run(options))
    except SavedRunError as error:
        sys.exit(str(error))
    print(markdown(measured))
    return measured


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the servers end, too
    main()
