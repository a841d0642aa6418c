"""What retrieval costs and finds: the default embedder, the three indexes, preparing a prompt, forgetting a document.

    python benchmarks/retrieval.py

Processor time, medians: what other processes take is left out. The questions are the demo's, two over each of 500
documents, for two seeds.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from harness import table, write_results
from sklearn.feature_extraction.text import HashingVectorizer

from stemcache import SamplingParams
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import SYSTEM_PROMPT, random_corpus
from stemcache.engine.engine import Engine
from stemcache.ragcache.context_cache import ContextCache
from stemcache.ragcache.documents import Document
from stemcache.ragcache.index import KINDS, new_index


def milliseconds(work: Callable[[], object], times: int = 15) -> float:
    spent = []
    for _ in range(times):
        start = time.process_time()
        work()
        spent.append(1000 * (time.process_time() - start))
    return round(statistics.median(spent), 3)


def embedders() -> list[dict[str, object]]:
    """Share of questions whose document is first, and among the first four."""
    rows: list[dict[str, object]] = []
    kinds = {"letters 3-5": {"analyzer": "char_wb", "ngram_range": (3, 5)}, "words": {}}
    for name, options in kinds.items():
        for dimensions in (512, 1024, 2048, 4096):
            vectorizer = HashingVectorizer(n_features=dimensions, norm="l2", dtype=np.float32, **options)
            ranks: list[int] = []
            for seed in range(2):
                corpus = random_corpus(random.Random(seed), 500)
                vectors = vectorizer.transform([f"{each.title}\n{each.text}" for each in corpus]).toarray()
                asked = [(i, fact.question) for i, each in enumerate(corpus) for fact in each.facts]
                scores = vectorizer.transform([question for _, question in asked]).toarray() @ vectors.T
                own = scores[np.arange(len(asked)), [i for i, _ in asked]]
                ranks += (scores > own[:, None]).sum(1).tolist()
            first, four = (sum(rank < n for rank in ranks) / len(ranks) for n in (1, 4))
            rows.append({"counts": name, "dimensions": dimensions, "first": round(first, 4), "first 4": round(four, 4)})
    return rows


def indexes(n: int = 20_000, dimensions: int = 384) -> list[dict[str, object]]:
    """Random vectors around 200 centres."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, dimensions))
    vectors = (centres[rng.integers(200, size=n)] + rng.normal(size=(n, dimensions))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[:50] + 0.02 * rng.normal(size=(50, dimensions)).astype(np.float32)
    rows: list[dict[str, object]] = []
    exact: list[set[int]] = []
    for kind in KINDS:
        index = new_index(kind, dimensions)
        start = time.process_time()
        index.add(range(n), vectors)
        built = time.process_time() - start
        found = [{each.key for each in index.search(query, 10)} for query in queries]
        exact = exact or found
        recall = sum(len(a & b) for a, b in zip(found, exact, strict=True)) / (10 * len(queries))
        first = [{each.key for each in next(iter(index.stages(query, 10)))} for query in queries]
        early = sum(len(a & b) for a, b in zip(first, found, strict=True)) / (10 * len(queries))
        rows.append(
            {
                "index": kind,
                "build s": round(built, 2),
                "search ms": milliseconds(lambda index=index: index.search(queries[0], 10)),
                "recall at 10": round(recall, 3),
                "right after stage 1": round(early, 3),
            }
        )
    return rows


def requests() -> list[dict[str, object]]:
    """What ragcache adds to a request of four documents, and what a deletion costs."""
    corpus = random_corpus(random.Random(0), 500)
    params = SamplingParams(max_tokens=1, temperature=0)
    with Engine.load(MODEL_PATH, pool_bytes=256 << 20) as engine, ContextCache(engine) as cache:
        cache.system_prompt = SYSTEM_PROMPT
        cache.add(Document(id=each.title, title=each.title, text=each.text) for each in corpus)
        questions = [each.facts[0].question for each in corpus]
        for question in questions[:200]:
            cache.ask(question, params=params)
        turn = iter(questions * 10)
        whole = milliseconds(lambda: cache.prepare(cache._messages(q := next(turn)), q), 100)
        search = milliseconds(lambda: cache.retrieve(next(turn)), 100)
        prepared = cache.prepare(cache._messages(questions[0]), questions[0])
        plain = milliseconds(
            lambda: engine.encode_chat(
                cache._messages(questions[0]), documents=[each.passage.for_template for each in prepared.retrieved]
            ),
            100,
        )
        names = iter([each.title for each in corpus[:60]])
        deleted = milliseconds(lambda: cache.delete(next(names)), 50)
        chunks = engine.stats().store.cached_chunks
    return [
        {"what": "prepare: retrieve, compose, note", "ms": whole},
        {"what": "of it: retrieve", "ms": search},
        {"what": "the chat template and tokenizer alone", "ms": plain},
        {"what": f"delete a document ({chunks} chunks cached)", "ms": deleted},
    ]


def main() -> None:
    torch.set_num_threads(1)
    results = {"embedders": embedders(), "indexes": indexes(), "requests": requests()}
    for name, rows in results.items():
        print(f"\n{name}\n{table(list(rows[0]), [list(row.values()) for row in rows])}")
    write_results("retrieval", results)


if __name__ == "__main__":
    main()
