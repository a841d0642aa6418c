"""What the questions of rag_timing.py find in the cache, for pools of several sizes: 1,000 of them, without a model.

    python benchmarks/rag_hits.py [--pools 0.1 0.25 0.5]

The default embedder's retrieval, then the real store and policies in the simulator; a busy machine changes nothing.
Prints and writes to results/rag_hits.json the share of the documents' tokens that are found, over three seeds, after
500 questions that warm the cache up.
"""

from __future__ import annotations

import argparse
from statistics import mean, stdev

import numpy as np
from harness import table, write_results
from rag_workload import exponent, long_corpus, questions
from transformers import AutoTokenizer

from stemcache.engine.demo import MODEL_PATH
from stemcache.ragcache.embedders import HashingEmbedder
from stemcache.ragcache.simulate import Setup, Simulation
from stemcache.ragcache.simulate_trace import Trace

K, N, WARMUP, COUNTED, CHUNK = 4, 500, 500, 1000, 64
SETUPS = (Setup("lru"), Setup("pgdsf+gate"), Setup("lru", order="cache"), Setup("pgdsf+gate", order="cache"))
NAMES = ("lru", "pgdsf", "lru, cache order", "pgdsf, cache order")


def trace(seed: int) -> Trace:
    corpus = long_corpus(N)
    tokenizer, embedder = AutoTokenizer.from_pretrained(MODEL_PATH), HashingEmbedder()
    lengths = [len(tokenizer.encode(each.text)) for each in corpus.documents]
    vectors = embedder.embed_documents([f"{each.title}\n{each.text}" for each in corpus.documents])
    found: dict[str, tuple[int, ...]] = {}
    for fact in {fact.question: fact for facts in corpus.facts for fact in facts}.values():
        scores = vectors @ embedder.embed_question(fact.question)
        found[fact.question] = tuple(np.argsort(-scores, kind="stable")[:K].tolist())
    asked = questions(corpus, WARMUP + COUNTED, seed)
    return Trace("questions", lengths, [found[each.question] for each in asked], [20] * len(asked), 32, orderable=True)


def hits(made: Trace, setup: Setup, pool: float) -> float:
    """The share of tokens hit after the warm-up."""
    simulation = Simulation(made, setup, capacity_tokens=int(pool * sum(made.lengths)), chunk_tokens=CHUNK)
    served, before = 0, (0, 0)

    def count() -> None:
        nonlocal served, before
        served += 1
        if served == WARMUP:
            before = simulation.rates.hit_tokens, simulation.rates.tokens

    rates = simulation.run(count)
    return (rates.hit_tokens - before[0]) / (rates.tokens - before[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", type=float, nargs="+", default=[0.1, 0.25, 0.5], help="shares of the corpus")
    options = parser.parse_args()
    traces = [trace(seed) for seed in (1, 2, 3)]
    rows = []
    for pool in options.pools:
        for name, setup in zip(NAMES, SETUPS, strict=True):
            rates = [hits(each, setup, pool) for each in traces]
            rows.append({"pool": pool, "configuration": name, "hit_tokens": rates})
            print(rows[-1], flush=True)
    cells = [
        [r["pool"], r["configuration"], f"{mean(r['hit_tokens']):.3f} ±{stdev(r['hit_tokens']):.3f}"]  # type: ignore[arg-type, type-var]
        for r in rows
    ]
    print(table(["pool", "configuration", "tokens found"], cells))
    print(write_results("rag_hits", {"k": K, "documents": N, "exponent": exponent(N), "rows": rows}))


if __name__ == "__main__":
    main()
