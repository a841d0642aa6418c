"""Synthetic workloads: what a retriever returns for questions whose documents are popular to different degrees.

Invariant: a seed and the parameters name a trace, on every machine.

The numbers are those that RAGCache (arXiv 2404.12457) reports or that follow from them: with a Zipf exponent of 0.95
over 20,000 documents the top 3 % get about 60 % of the requests, and a Wikipedia article has 3,718 tokens on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stemcache.ragcache.simulate_trace import QUESTION_TOKENS, Trace

LONGEST: Final = 32_768  # tokens: what is longer is split before it is indexed
SHORTEST: Final = 64


@dataclass(frozen=True, slots=True)
class Workload:
    """How requests are drawn.

    Attributes:
        n_documents: and n_requests, and k of the one for each of the other.
        zipf: exponent of the popularity of the first document.
        mean_tokens, sigma: of the documents' lengths, which are log-normal; sigma is that of the logarithm.
        topic_size, neighbours: each further document is, with this probability, one of the first one's topic, which has
            so many documents, and else drawn like the first.
        shuffled: share of requests whose documents come in random order.
        drift_every: requests after which `drift_replaced` of the `drift_top` most popular documents trade their
            popularity with unpopular ones; 0 for never.
    """

    n_documents: int = 20_000
    n_requests: int = 6_000
    k: int = 2
    zipf: float = 0.95
    mean_tokens: float = 3_718
    sigma: float = 0.8
    topic_size: int = 20
    neighbours: float = 0.6
    shuffled: float = 0.3
    drift_every: int = 0
    drift_replaced: int = 400
    drift_top: int = 2_000
    system_tokens: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.topic_size <= self.n_documents:
            raise ValueError("k must be at most topic_size, and that at most n_documents")
        if self.drift_every and not self.drift_replaced <= self.drift_top <= self.n_documents // 2:
            raise ValueError("drift_replaced must be at most drift_top, and that at most half of n_documents")

    def draw(self, seed: int) -> Trace:
        """Return the trace of a seed."""
        generator, random = np.random.default_rng(seed), Random(seed)
        lengths = self._lengths(generator)
        ranked = generator.permutation(self.n_documents)  # documents by popularity, so topics mix popular and not
        cumulative = np.cumsum(np.arange(1, self.n_documents + 1) ** -self.zipf)
        requests = []
        for at in range(self.n_requests):
            if self.drift_every and at and at % self.drift_every == 0:
                self._drift(generator, ranked)
            requests.append(self._request(random, ranked, cumulative))
        name = f"zipf {self.zipf}, k={self.k}, {'drift' if self.drift_every else 'static'}"
        questions = [QUESTION_TOKENS] * self.n_requests
        return Trace(name, lengths, requests, questions, self.system_tokens, orderable=True)

    def _lengths(self, generator: np.random.Generator) -> list[int]:
        drawn = generator.lognormal(np.log(self.mean_tokens) - self.sigma**2 / 2, self.sigma, self.n_documents)
        return [int(length) for length in np.clip(drawn, SHORTEST, LONGEST)]

    def _drift(self, generator: np.random.Generator, ranked: NDArray[Any]) -> None:
        popular = generator.choice(self.drift_top, self.drift_replaced, replace=False)
        others = self.drift_top + generator.choice(
            self.n_documents - self.drift_top, self.drift_replaced, replace=False
        )
        ranked[popular], ranked[others] = ranked[others], ranked[popular]

    def _request(self, random: Random, ranked: NDArray[Any], cumulative: NDArray[Any]) -> tuple[int, ...]:
        def popular() -> int:
            return int(ranked[int(np.searchsorted(cumulative, random.random() * cumulative[-1]))])

        documents = [popular()]
        topic = documents[0] - documents[0] % self.topic_size
        last = min(topic + self.topic_size, self.n_documents)
        while len(documents) < self.k:
            drawn = random.randrange(topic, last) if random.random() < self.neighbours else popular()
            if drawn not in documents:
                documents.append(drawn)
        if random.random() < self.shuffled:
            random.shuffle(documents)
        return tuple(documents)
