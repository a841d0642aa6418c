"""The simulator: a trace through the real prefix store, under the real policies, without a model.

Invariant: what it does to the store is what the engine does for a request that runs alone (acquire, reserve, commit,
release), so its hits are those of the engine. Only the tokens are made up: one of them stands for a quarter of a chunk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from stemcache.engine.policies import history_for
from stemcache.engine.turns import WINDOW, cache_first
from stemcache.prefixtree.errors import CapacityError
from stemcache.prefixtree.eviction import LFU, LRU, EvictionPolicy
from stemcache.prefixtree.fading_pgdsf import FadingPGDSF
from stemcache.prefixtree.frequency import FrequencySketch
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.pgdsf import PGDSF
from stemcache.prefixtree.store import PrefixStore
from stemcache.ragcache.demand import Demand
from stemcache.ragcache.order import cache_order
from stemcache.ragcache.simulate_trace import Trace, TraceError

GRAIN: Final = 4  # made-up tokens in a chunk
NAMESPACE: Final = Namespace.of(model="simulated", dtype="none")

# Tokens of context at which attention costs as much as all else: 14 GFLOP per token for the weights of a model of 7
# billion parameters, 32 layers * 4 * 4,096 FLOP for each token of context.
ATTENTION_EQUALS_REST: Final = 27_000


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to run a cache.

    Attributes:
        policy: lru, lfu, perfect lfu, pgdsf (as published, with a memory of what it evicted) or pgdsf+gate (the
            engine's `pgdsf`).
        order: of documents, relevance or cache.
        queue: of requests, fcfs or cache.
        max_shift: how far the order `cache` may move a document; None for any.
        backlog: requests that wait at any moment; 1 is a server that is never behind.
    """

    policy: str = "lru"
    order: str = "relevance"
    queue: str = "fcfs"
    max_shift: int | None = None
    backlog: int = 1

    @property
    def name(self) -> str:
        shift = "" if self.max_shift is None else f" (shift {self.max_shift})"
        order = "" if self.order == "relevance" else f", {self.order} order{shift}"
        return self.policy + order + ("" if self.queue == "fcfs" else f", {self.queue} queue")


@dataclass(slots=True)
class HitRates:
    """Hits and all, over the documents of a trace. System prompts and questions do not count.

    A document is hit if every whole chunk up to its end was cached, and its tokens that lie in such chunks are hits.
    """

    documents: int = 0
    hit_documents: int = 0
    tokens: int = 0
    hit_tokens: int = 0

    @property
    def document_rate(self) -> float:
        return self.hit_documents / max(1, self.documents)

    @property
    def token_rate(self) -> float:
        return self.hit_tokens / max(1, self.tokens)

    def count(self, lengths: Iterable[int], begin: int, cached: int, chunk: int) -> None:
        """Enter a request whose documents, of these lengths, stand one after another from token `begin` on."""
        cached -= cached % chunk
        for length in lengths:
            end = begin + length
            whole = max(end - end % chunk, begin + 1)
            self.documents += 1
            self.hit_documents += cached >= whole
            self.tokens += length
            self.hit_tokens += max(0, min(cached, end) - begin)
            begin = end


class PerfectLFU(LFU):
    """LFU that counts everything since the trace began, in unbounded memory: hard to beat while nothing changes."""

    def __init__(self) -> None:
        self._gone: defaultdict[bytes, float] = defaultdict(float)

    def insert(self, node: Node, expected: float) -> float:
        node.history = self._gone[node.digest]
        return self.touch(node, 0)

    def touch(self, node: Node, uses: int) -> float:
        return node.history + super().touch(node, uses)

    def inherit(self, parent: Node, child: Node) -> float:
        return parent.history + super().inherit(parent, child)

    def evict(self, node: Node) -> None:
        self._gone[node.digest] += node.uses


def make_policy(name: str, n_chunks: int, chunk_tokens: int) -> EvictionPolicy:
    """Return a policy by the name that `Setup` gives it."""

    def cost(depth: int) -> float:
        return 1.0 + depth * chunk_tokens / ATTENTION_EQUALS_REST

    policies: dict[str, Callable[[], EvictionPolicy]] = {
        "lru": LRU,
        "lfu": LFU,
        "perfect lfu": PerfectLFU,
        "pgdsf": lambda: PGDSF(cost, FrequencySketch(40 * n_chunks, 10.0 * n_chunks)),  # hits less with `history_for`
        "pgdsf+gate": lambda: FadingPGDSF(history_for(n_chunks), cost),
    }
    return policies[name]()


@dataclass(slots=True)
class Prompts:
    """The made-up tokens of a trace. `sizes` and `system` are in those tokens."""

    trace: Trace
    chunk_tokens: int
    sizes: list[int] = field(init=False)
    system: list[int] = field(init=False)

    def __post_init__(self) -> None:
        n_documents = len(self.trace.lengths)
        self.sizes = [self._size(length) for length in self.trace.lengths]
        self.system = [n_documents] * self._size(self.trace.system_tokens)

    def of(self, documents: Sequence[int]) -> list[int]:
        """A prompt's tokens up to the end of its documents."""
        tokens = list(self.system)
        for document in documents:
            tokens += [document] * self.sizes[document]
        return tokens

    def question(self, index: int) -> list[int]:
        return [len(self.sizes) + 1 + index] * self._size(self.trace.questions[index])

    def _size(self, n_tokens: int) -> int:
        return -(-n_tokens * GRAIN // self.chunk_tokens)


class Simulation:
    """A store of `capacity_tokens`, and a trace that runs through it."""

    def __init__(self, trace: Trace, setup: Setup, *, capacity_tokens: int, chunk_tokens: int) -> None:
        n_chunks = capacity_tokens // chunk_tokens
        if n_chunks < 1 or chunk_tokens < GRAIN:
            raise TraceError(f"a cache of {capacity_tokens} tokens has no chunk of {chunk_tokens}, {GRAIN} at least")
        self._setup = setup
        self._trace = trace
        self._prompts = Prompts(trace, chunk_tokens)
        policy = make_policy(setup.policy, n_chunks, chunk_tokens)
        self.store = PrefixStore(n_chunks, GRAIN, _no_copy, policy)
        self.rates = HitRates()
        self._demand = Demand()

    def run(self, on_request: Callable[[], object] = lambda: None) -> HitRates:
        """Serve all requests; `on_request` is called after each. Returns what was hit."""
        arriving = iter(range(len(self._trace.requests)))
        backlog: list[_Waiting] = []
        while True:
            while len(backlog) < self._setup.backlog and (index := next(arriving, None)) is not None:
                backlog.append(_Waiting(index))
            if not backlog:
                return self.rates
            chosen = self._next(backlog)
            for earlier in backlog[: backlog.index(chosen)]:
                earlier.overtaken += 1
            backlog.remove(chosen)
            self._serve(chosen.index)
            on_request()

    def _next(self, backlog: list[_Waiting]) -> _Waiting:
        if self._setup.queue == "fcfs" or len(backlog) == 1:
            return backlog[0]
        return cache_first(backlog, self._cached_share, lambda waiting: waiting.overtaken, WINDOW)[0]

    def _cached_share(self, waiting: _Waiting) -> float:
        tokens = self._prompts.of(self._trace.requests[waiting.index])
        cached = self.store.match_tokens(tokens, NAMESPACE)
        return cached / (len(tokens) - cached + 1)

    def _serve(self, index: int) -> None:
        documents = self._ordered(self._trace.requests[index])
        sizes = [self._prompts.sizes[document] for document in documents]
        _, *stops = accumulate(sizes, initial=len(self._prompts.system))
        expected = self._demand.expected(None, documents, stops)
        self._demand.count(None, documents)
        tokens = self._prompts.of(documents) + self._prompts.question(index)
        with self.store.acquire(tokens, NAMESPACE) as lease:
            lease.expected = expected
            try:
                lease.reserve(len(tokens))
            except CapacityError:  # longer than the pool: nothing of it can be kept
                self.rates.count(sizes, len(self._prompts.system), 0, GRAIN)
                return
            self.rates.count(sizes, len(self._prompts.system), lease.cached_tokens, GRAIN)
            lease.commit(tokens)

    def _ordered(self, documents: Sequence[int]) -> Sequence[int]:
        if self._setup.order == "relevance" or not self._trace.orderable:
            return documents
        return cache_order(
            documents,
            lambda path: self.store.match_tokens(self._prompts.of(path), NAMESPACE),
            lambda document: self._demand.of(None, document),
            together=lambda one, other: self._demand.of(None, one, other),
            max_shift=self._setup.max_shift,
            min_gain=GRAIN,
        )


@dataclass(eq=False, slots=True)
class _Waiting:
    index: int
    overtaken: int = 0


def _no_copy(source_slot: int, target_slot: int, n_tokens: int) -> None:
    """There is no memory behind the slots here."""
