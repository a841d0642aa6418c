"""The order of requests, first come first served against cached first, on a running engine.

    python benchmarks/queue_order.py [--repeats 3]

Questions about a few documents arrive at random times on a pool with room for some of the documents. Prints and writes
to results/queue_order.json: prompt tokens that had to be computed, and times to first token, at several rates of
arrival. A pair of runs is interleaved; a rate is given as the share of what the engine could compute without a cache.
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import mean, median, quantiles
from typing import Any

import torch
from harness import table, write_results

from stemcache import Engine, SamplingParams
from stemcache.engine.demo import MODEL_PATH

ONE = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
N_DOCUMENTS, DOCUMENT_TOKENS, QUESTION_TOKENS, ROOM = 12, 640, 24, 4


def prompts(seed: int, n: int, vocab: int) -> list[list[int]]:
    rng = random.Random(seed)
    documents = [[rng.randrange(vocab) for _ in range(DOCUMENT_TOKENS)] for _ in range(N_DOCUMENTS)]
    return [rng.choice(documents) + [rng.randrange(vocab) for _ in range(QUESTION_TOKENS)] for _ in range(n)]


def run(engine: Engine, asked: list[list[int]], gaps: list[float]) -> tuple[int, list[float]]:
    """Send the prompts with these seconds between them; returns the tokens computed, and times to first token."""
    engine.clear_cache()
    streams = []
    begin = time.perf_counter()
    at = 0.0
    for prompt, gap in zip(asked, gaps, strict=True):
        at += gap
        time.sleep(max(0.0, begin + at - time.perf_counter()))
        streams.append(engine.submit(prompt, ONE))
    for stream in streams:
        list(stream)
    computed = sum(len(p) - stream.usage.cached_tokens for p, stream in zip(asked, streams, strict=True))
    return computed, [(s.timing.first_token or 0.0) - s.timing.submitted for s in streams]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=80)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with Engine.load(MODEL_PATH, dtype="float32", pool_bytes=1 << 20) as probe:
        chunk_bytes = (1 << 20) // probe.stats().store.total_chunks
    # The requests that run hold slots, too: two of them, and the documents that stay.
    pool = chunk_bytes * (ROOM * DOCUMENT_TOKENS // 64 + 4)
    engines = {
        queue: Engine.load(MODEL_PATH, dtype="float32", pool_bytes=pool, queue=queue) for queue in ("fcfs", "cache")
    }
    cold = prompts(0, 1, engines["fcfs"].vocab_size)
    seconds = median(run(engines["fcfs"], cold, [0.0])[1][0] for _ in range(5))
    for load in (1.0, 8.0):
        samples: dict[str, list[tuple[int, list[float]]]] = {queue: [] for queue in engines}
        for seed in range(options.repeats):
            rng = random.Random(seed)
            asked = prompts(seed, options.requests, engines["fcfs"].vocab_size)
            gaps = [rng.expovariate(load / seconds) for _ in asked]
            for queue, engine in engines.items():
                samples[queue].append(run(engine, asked, gaps))
        for queue, found in samples.items():
            rows.append(
                {
                    "load": load,
                    "queue": queue,
                    "computed_tokens": mean(computed for computed, _ in found),
                    "mean_ttft": median(mean(times) for _, times in found),
                    "p95_ttft": median(quantiles(times, n=20)[-1] for _, times in found),
                }
            )
            print(rows[-1], flush=True)
    for engine in engines.values():
        engine.check()
        engine.close()
    print(
        table(
            ["load", "queue", "computed tokens", "mean TTFT (s)", "p95 TTFT (s)"],
            [
                [r["load"], r["queue"], f"{r['computed_tokens']:.0f}", f"{r['mean_ttft']:.3f}", f"{r['p95_ttft']:.3f}"]
                for r in rows
            ],
        )
    )
    print(write_results("queue_order", {"requests": options.requests, "cold_seconds": seconds, "rows": rows}))


if __name__ == "__main__":
    main()
