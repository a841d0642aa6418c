"""How the bookkeeping's cost grows with the tree, from 1,000 to 1,000,000 chunks, and with 1 to 1,024 sequences.

    python benchmarks/growth.py [--quick]

No model, no tensors of keys and values: the store takes any function that copies. Prints two tables, writes
results/growth.json and draws docs/growth.svg. Each figure is the median of repeats in processor time of the one thread
that does all this in the engine, so others on the machine count only by what they take of its caches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from harness import table, write_results

from stemcache.api.charts import Lines, draw_lines
from stemcache.engine.detokenizer import Detokenizer
from stemcache.engine.sampling import SamplingParams
from stemcache.engine.scheduler import Scheduled, Scheduler
from stemcache.engine.sequence import Request, Sequence
from stemcache.engine.stream import Stream
from stemcache.kernels.plan import AttentionPlan, SequenceRows
from stemcache.prefixtree.lease import Lease
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.store import PrefixStore

CHUNK = 64
PROMPT_CHUNKS = 50
DECODING = 32  # sequences that decode while the tree's size varies
NAMESPACE = Namespace.of(model="benchmark", dtype="float32")
CHART = Path(__file__).parents[1] / "docs" / "growth.svg"


def no_copy(source_slot: int, target_slot: int, n_tokens: int) -> None:
    """There is no memory behind the slots here."""


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median processor time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return statistics.median(times)


class Prompts:
    """Random prompts of PROMPT_CHUNKS chunks; numpy draws them fast enough for a million chunks."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def next(self, chunks: int = PROMPT_CHUNKS) -> list[int]:
        drawn: list[int] = self._random.integers(0, 1 << 17, chunks * CHUNK).tolist()
        return drawn


def hold(store: PrefixStore, tokens: list[int]) -> Lease:
    """A sequence that has computed `tokens`."""
    lease = store.acquire(tokens[:-1], NAMESPACE)
    lease.reserve(len(tokens))
    lease.commit(tokens)
    return lease


# -- the tree grows ----------------------------------------------------------------------------------------------------


def by_tree(n_chunks: int, repeats: int) -> dict[str, float]:
    """Seconds for one chunk of each operation, and for one sequence of a decode step, in a tree of `n_chunks`."""
    prompts = Prompts(n_chunks)
    store = PrefixStore(n_chunks + (repeats + 4) * PROMPT_CHUNKS + DECODING * 8, CHUNK, no_copy)
    known = [prompts.next() for _ in range(n_chunks // PROMPT_CHUNKS)]
    for tokens in known:
        hold(store, tokens).release()
    asked = iter(Random(0).choices(known, k=repeats))
    del known
    sequences = [prompts.next(2)[:-1] for _ in range(DECODING)]
    leases = [hold(store, tokens) for tokens in sequences]

    def match() -> None:
        assert store.match_tokens(next(asked), NAMESPACE) == PROMPT_CHUNKS * CHUNK

    def step() -> None:
        for tokens, lease in zip(sequences, leases, strict=True):
            tokens.append(0)
            lease.reserve(len(tokens))
            lease.commit(tokens)

    new = iter([prompts.next() for _ in range(repeats)])
    found = {
        "match": seconds(match, repeats) / PROMPT_CHUNKS,
        "insert": seconds(lambda: hold(store, next(new)).release(), repeats) / PROMPT_CHUNKS,
        "evict": seconds(partial(store._ledger.evict, PROMPT_CHUNKS), repeats) / PROMPT_CHUNKS,
        "decode step": seconds(step, min(repeats, CHUNK)) / DECODING,
    }
    assert abs(store.stats().cached_chunks - n_chunks) < 2 * DECODING + PROMPT_CHUNKS
    return found


# -- the sequences grow ------------------------------------------------------------------------------------------------


def decoding(store: PrefixStore, scheduler: Scheduler, shared: list[int], own: list[int]) -> Sequence:
    """A sequence that has read its prompt and one token more."""
    tokens = shared + own
    request = Request(tokens[:-1], SamplingParams(), NAMESPACE, 1 << 20, Stream(len(tokens) - 1, lambda: None))
    # Bookkeeping neither turns tokens into text nor chooses any.
    sequence = Sequence(request, 0, tokens, Detokenizer(None, [1], ()), None)  # type: ignore[arg-type]
    sequence.lease = hold(store, tokens[:-1])
    sequence.computed = len(tokens) - 1
    scheduler.running.append(sequence)
    return sequence


def plan(step: list[Scheduled]) -> AttentionPlan:
    """What the runner makes of a step before the model runs."""
    rows = []
    for entry in step:
        assert entry.sequence.lease is not None
        rows.append(SequenceRows(np.asarray(entry.sequence.lease.slots, dtype=np.int32), entry.start, entry.stop))
    return AttentionPlan.build(rows, chunk_tokens=CHUNK)


def commit(step: list[Scheduled]) -> None:
    """Publish what a step computed, and take a token for each sequence."""
    for entry in step:
        assert entry.sequence.lease is not None
        entry.sequence.computed = entry.stop
        entry.sequence.lease.commit(entry.sequence.tokens)
        entry.sequence.tokens.append(0)


def by_sequences(n: int, repeats: int) -> dict[str, float]:
    """Seconds of the parts of one decode step of `n` sequences, over one prompt and their own 40 tokens."""
    store = PrefixStore(PROMPT_CHUNKS + 4 * n, CHUNK, no_copy)
    scheduler = Scheduler(store, max_step_tokens=512, max_running=n)
    prompts = Prompts(n)
    shared = prompts.next()
    for _ in range(n):
        decoding(store, scheduler, shared, prompts.next(1)[:40])
    times: dict[str, list[float]] = {"schedule": [], "plan": [], "commit": []}
    for _ in range(repeats):
        begin = time.process_time()
        step = scheduler.schedule()
        scheduled = time.process_time()
        plan(step)
        planned = time.process_time()
        commit(step)
        for name, taken in zip(
            times, (scheduled - begin, planned - scheduled, time.process_time() - planned), strict=True
        ):
            times[name].append(taken)
    assert len(step) == n
    store.check()
    return {name: statistics.median(samples) for name, samples in times.items()}


# -- all of it ---------------------------------------------------------------------------------------------------------


def chart(trees: dict[int, dict[str, float]], steps: dict[int, dict[str, float]]) -> None:
    """Draw both as lines, microseconds."""
    operations = {name: [(n, row[name] * 1e6) for n, row in trees.items()] for name in next(iter(trees.values()))}
    parts = {name: [(n, row[name] * 1e6) for n, row in steps.items()] for name in next(iter(steps.values()))}
    panels = [
        Lines("One operation as the tree grows", "chunks in the tree", "microseconds", operations),
        Lines("One step as sequences grow", "decoding sequences", "microseconds a step", parts),
    ]
    draw_lines(panels, CHART)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats; writes nothing")
    quick = parser.parse_args().quick
    sizes = [1_000, 3_000] if quick else [1_000, 10_000, 100_000, 1_000_000]
    batches = [1, 4] if quick else [1, 4, 16, 64, 256, 1_024]
    trees = {n: by_tree(n, 9 if quick else 60) for n in sizes}
    operations = list(trees[sizes[0]])
    print("microseconds: for one chunk of a prompt of 50; a decode step for one sequence of 32")
    cells = [[f"{n:,}", *(f"{row[name] * 1e6:.2f}" for name in operations)] for n, row in trees.items()]
    print(table(["chunks", *operations], cells))
    steps = {n: by_sequences(n, 5 if quick else 20) for n in batches}
    parts = list(steps[1])
    print("\nmicroseconds of a decode step (for one sequence)")
    cells = [
        [f"{n:,}", *(f"{row[name] * 1e6:.1f} ({row[name] / n * 1e6:.1f})" for name in parts)]
        for n, row in steps.items()
    ]
    print(table(["sequences", *parts], cells))
    if quick:
        return
    chart(trees, steps)
    settings: dict[str, Any] = {"chunk_tokens": CHUNK, "prompt_chunks": PROMPT_CHUNKS}
    print(write_results("growth", {**settings, "tree": trees, "sequences": steps}))


if __name__ == "__main__":
    main()
