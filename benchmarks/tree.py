"""The store's bookkeeping: match, insert, decode step, eviction and slot placement. No model, no tensors.

    python benchmarks/tree.py [--quick]

Prints tables and writes results/tree.json. Times are of one call, median of interleaved repeats.
"""

from __future__ import annotations

import argparse
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from random import Random
from statistics import mean
from typing import Any

from harness import Timing, interleave, table, write_results

from stemcache.prefixtree import ledger
from stemcache.prefixtree.errors import CapacityError
from stemcache.prefixtree.lease import Lease
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.slots import SlotAllocator
from stemcache.prefixtree.store import PrefixStore
from stemcache.prefixtree.tokens import encode_tokens

CHUNK = 64
NAMESPACE = Namespace.of(model="benchmark", dtype="float32")
DOCUMENT_CHUNKS = 50  # what fills the tree beforehand: documents of 3,200 tokens


def no_copy(source_slot: int, target_slot: int, n_tokens: int) -> None:
    """There is no memory behind the slots here."""


def random_tokens(random: Random, n: int) -> list[int]:
    return random.choices(range(1 << 17), k=n)


def run(store: PrefixStore, tokens: list[int]) -> None:
    """A sequence's life without its model: acquire, reserve, commit, release."""
    with store.acquire(tokens, NAMESPACE) as lease:
        lease.reserve(len(tokens))
        lease.commit(tokens)


def run_next(store: PrefixStore, prompts: Iterator[list[int]]) -> None:
    run(store, next(prompts))


def reuse(store: PrefixStore, tokens: list[int]) -> None:
    """What a fully cached prompt costs: acquire and release."""
    store.acquire(tokens, NAMESPACE).release()


def filled_store(n_chunks: int, room: int, random: Random) -> PrefixStore:
    """A store with `n_chunks` cached chunks and `room` free ones."""
    store = PrefixStore(n_chunks + room, CHUNK, no_copy)
    for _ in range(n_chunks // DOCUMENT_CHUNKS):
        run(store, random_tokens(random, DOCUMENT_CHUNKS * CHUNK))
    return store


def match_and_insert(sizes: list[int], fillings: list[int], repeats: int) -> list[dict[str, Any]]:
    random = Random(0)
    rows = []
    for n_cached in fillings:
        for n_tokens in sizes:
            room = (repeats + 4) * (n_tokens // CHUNK + 1)
            store = filled_store(n_cached, room, random)
            known, unknown = random_tokens(random, n_tokens), random_tokens(random, n_tokens)
            run(store, known)
            new = iter([random_tokens(random, n_tokens) for _ in range(repeats + 2)])
            functions: dict[str, Callable[[], object]] = {
                "encode": partial(encode_tokens, known),
                "match": partial(store.match_tokens, known, NAMESPACE),
                "miss": partial(store.match_tokens, unknown, NAMESPACE),
                "reuse": partial(reuse, store, known),
                "insert": partial(run_next, store, new),
            }
            timings = interleave(functions, repeats=repeats)
            store.check()
            rows.append({"cached_chunks": n_cached, "tokens": n_tokens, **{k: seconds(t) for k, t in timings.items()}})
    return rows


def decode_steps(lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    """Reserve and commit after every generated token: per token, averaged over four chunks."""
    random = Random(1)
    rows = []
    for n_tokens in lengths:
        store = PrefixStore(n_tokens // CHUNK + 8 * (repeats + 4), CHUNK, no_copy)
        tokens = random_tokens(random, n_tokens)
        lease = store.acquire(tokens, NAMESPACE)
        lease.reserve(n_tokens)
        lease.commit(tokens)

        def decode(lease: Lease = lease, tokens: list[int] = tokens) -> None:
            for token in range(4 * CHUNK):
                tokens.append(token)
                lease.reserve(len(tokens))
                lease.commit(tokens)

        timing = interleave({"decode": decode}, repeats=repeats)["decode"]
        rows.append({"tokens": n_tokens, "step": timing.median / (4 * CHUNK)})
    return rows


def eviction(fillings: list[int]) -> list[dict[str, Any]]:
    """Emptying a tree of chains, and one whose chunks all hang on the root (the widest possible node)."""
    rows = []
    for n_chunks in fillings:
        chains = filled_store(n_chunks, 0, Random(2))
        wide = PrefixStore(n_chunks, CHUNK, no_copy)
        for index in range(n_chunks):
            run(wide, [index] * CHUNK)
        row: dict[str, Any] = {"cached_chunks": n_chunks}
        for name, store in (("chains", chains), ("wide", wide)):
            begin = time.perf_counter()
            n_evicted = store.clear()
            row[name] = (time.perf_counter() - begin) / n_evicted
        rows.append(row)
    return rows


class BestFit(SlotAllocator):
    """The rejected placement: the start of the smallest run that fits."""

    def _place(self, n: int) -> tuple[int, int]:
        index = min(bisect_left(self._by_length, (n, -1)), len(self._by_length) - 1)
        return self._by_length[index][1], 0


def placement(n_requests: int) -> list[dict[str, Any]]:
    rows = []
    share = ledger.EVICTION_SHARE
    for pool_chunks, batch in ((1_500, 16), (4_000, 32), (12_000, 32)):
        for allocator in (BestFit, SlotAllocator):
            for evict in ("exactly", "batches"):
                ledger.EVICTION_SHARE = share if evict == "batches" else pool_chunks
                figures = serve(pool_chunks, batch, n_requests, allocator)
                name = "best fit" if allocator is BestFit else "middle"
                rows.append({"pool": pool_chunks, "batch": batch, "place": name, "evict": evict, **figures})
    ledger.EVICTION_SHARE = share
    return rows


def serve(pool_chunks: int, batch: int, n_requests: int, allocator: type[SlotAllocator]) -> dict[str, float]:
    """Requests on Pareto-distributed documents of 8 to 47 chunks, with up to 6 chunks of question and 12 of answer.

    Counts, over the second half: runs per sequence at its end, chunks per run, how often growth continued the run.
    """
    random, chunk, names = Random(3), 4, count()
    store = PrefixStore(pool_chunks, chunk, no_copy)
    store._ledger.slots = allocator(pool_chunks)
    running: list[tuple[Lease, list[int], int]] = []
    pieces: list[int] = []
    lengths: list[int] = []
    grown: list[bool] = []
    while len(pieces) < n_requests:
        while len(running) < batch:
            document = min(int(random.paretovariate(1.0)), 60)
            prompt = [document] * ((13 * document % 40 + 8) * chunk)
            prompt += [1_000 + next(names)] * random.randint(1, 6 * chunk)
            lease = store.acquire(prompt[:-1], NAMESPACE)
            lease.reserve(len(prompt))
            lease.commit(prompt)
            running.append((lease, prompt, len(prompt) + random.randint(1, 12 * chunk)))
        for entry in list(running):
            lease, tokens, stop = entry
            tokens.append(next(names))
            n_before = len(lease.slots)
            try:
                lease.reserve(len(tokens))
            except CapacityError:
                stop = 0
            if len(lease.slots) > n_before:
                grown.append(lease.slots[-1] == lease.slots[-2] + 1)
            if len(tokens) >= stop > 0:
                pieces.append(1 + sum(b != a + 1 for a, b in zip(lease.slots, lease.slots[1:], strict=False)))
                lengths.append(len(lease.slots))
            if len(tokens) >= stop:
                lease.release()
                running.remove(entry)
            else:
                lease.commit(tokens)
    stats, half = store.stats(), n_requests // 2
    return {
        "runs_per_sequence": mean(pieces[half:]),
        "chunks_per_run": sum(lengths[half:]) / sum(pieces[half:]),
        "grown_in_place": mean(grown[len(grown) // 2 :]),
        "hit_rate": stats.hit_tokens / (stats.hit_tokens + stats.miss_tokens),
    }


def seconds(timing: Timing) -> dict[str, float]:
    return {"median": timing.median, "low": timing.low, "high": timing.high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    quick = parser.parse_args().quick
    sizes = [1_000, 10_000, 100_000]
    fillings = [0, 1_000, 10_000] if quick else [0, 1_000, 10_000, 100_000]
    repeats = 5 if quick else 15

    match = match_and_insert(sizes, fillings, repeats)
    names = ("encode", "match", "miss", "reuse", "insert")
    print("milliseconds per call (nanoseconds per token); chunks of 64 tokens")
    cells = [[r[n]["median"] for n in names] for r in match]
    print(
        table(
            ["cached chunks", "tokens", *names],
            [
                [r["cached_chunks"], r["tokens"], *[f"{t * 1e3:.3f} ({t / r['tokens'] * 1e9:.0f})" for t in row]]
                for r, row in zip(match, cells, strict=True)
            ],
        )
    )
    decode = decode_steps(sizes, repeats)
    print("\nmicroseconds per decode step (reserve + commit)")
    print(table(["tokens so far", "step"], [[r["tokens"], f"{r['step'] * 1e6:.2f}"] for r in decode]))
    evict = eviction([n for n in fillings if n])
    print("\nmicroseconds per evicted chunk")
    print(
        table(
            ["cached chunks", "chains", "wide"],
            [[r["cached_chunks"], f"{r['chains'] * 1e6:.2f}", f"{r['wide'] * 1e6:.2f}"] for r in evict],
        )
    )
    place = placement(200 if quick else 600)
    print("\nplacement of slots in a simulated serving load")
    header = list(place[0])
    print(table(header, [[f"{v:.2f}" if isinstance(v, float) else v for v in r.values()] for r in place]))
    if not quick:
        write_results("tree", {"match": match, "decode": decode, "eviction": evict, "placement": place})


if __name__ == "__main__":
    main()
