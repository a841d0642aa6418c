"""Questions over a corpus with Zipf popularity, for the benchmarks of the context cache.

Invariant: a seed names the corpus and the questions. Each document is asked two questions, so the same ones come again.
RAGCache (arXiv 2404.12457) measured that 3 % of the documents get 60 % of the requests; the exponent follows from that.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from stemcache.engine.demo.facts import ATTRIBUTES, Fact, random_corpus
from stemcache.ragcache.documents import Document

TOP, SHARE = 0.03, 0.6


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, and the two facts of each that are asked for."""

    documents: list[Document]
    facts: list[tuple[Fact, ...]]


def short_corpus(n: int, seed: int = 0) -> Corpus:
    """The demo's documents of about 60 tokens, which its model answers from."""
    made = random_corpus(random.Random(seed), n)
    return Corpus(
        [Document(id=each.title, title=each.title, text=each.text) for each in made], [each.facts for each in made]
    )


def long_corpus(n: int, seed: int = 0) -> Corpus:
    """Documents of some 300 to 600 tokens: what is known of several places, the first of which is asked for."""
    rng = random.Random(seed)
    pieces = iter(random_corpus(rng, 5 * n, facts=len(ATTRIBUTES), fillers=6))
    documents, facts = [], []
    for _ in range(n):
        parts = [next(pieces) for _ in range(rng.randint(2, 4))]
        text = "\n\n".join(f"{part.title}. {part.text}" for part in parts)
        documents.append(Document(id=parts[0].title, title=parts[0].title, text=text))
        facts.append(parts[0].facts[:2])
    return Corpus(documents, facts)


def exponent(n: int) -> float:
    """The Zipf exponent with which the top 3 % of n documents get 60 % of the questions, by bisection."""
    low, high = 0.0, 4.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        weights = [rank**-middle for rank in range(1, n + 1)]
        low, high = (low, middle) if sum(weights[: round(TOP * n)]) > SHARE * sum(weights) else (middle, high)
    return low


def questions(corpus: Corpus, n: int, seed: int) -> Sequence[Fact]:
    """Facts to ask for: a document by its popularity, which has nothing to do with its number, and one of its two."""
    rng = random.Random(seed)
    ranked = list(range(len(corpus.documents)))
    rng.shuffle(ranked)
    power = exponent(len(ranked))
    cumulative = list(accumulate(rank**-power for rank in range(1, len(ranked) + 1)))
    return [rng.choice(corpus.facts[each]) for each in rng.choices(ranked, cum_weights=cumulative, k=n)]
