"""A request and its sequences: the engine's bookkeeping of one prompt and its choices.

Invariant: the keys and values of `tokens[:computed]` lie in the slots of `lease`, and those of the tokens that were
moved there; a sequence without a lease has computed nothing. `tokens` is the prompt followed by what was generated, and
only ever grows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from stemcache.engine.blend import Blend, Moved
from stemcache.engine.detokenizer import Detokenizer
from stemcache.engine.grammar import CompiledGrammar
from stemcache.engine.outputs import FinishReason, Usage
from stemcache.engine.sampler import TokenChooser
from stemcache.engine.sampling import SamplingParams
from stemcache.engine.stream import Stream
from stemcache.engine.tentative import Tentative
from stemcache.engine.token_rules import TokenRules
from stemcache.prefixtree.expected import NOTHING, Expected
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.store import Lease

_arrivals = itertools.count()


@dataclass(eq=False, slots=True)
class Request:
    """One prompt with its parameters, and where its deltas go. `max_tokens` is what is left of the context at most.

    `tenant` is whom its tokens are charged to, and `priority` its rank within that tenant, the smallest first. `blend`
    says which of its tokens may be moved to their places, and `moved` which ones were when it first started.
    `tentative` where it may be that nobody wants it. `expected` is for the eviction policy.
    """

    prompt: list[int]
    params: SamplingParams
    namespace: Namespace
    max_tokens: int
    stream: Stream
    tenant: bytes = b""
    priority: int = 0
    rules: TokenRules | None = None
    grammar: CompiledGrammar | None = None
    blend: Blend | None = None
    tentative: Tentative | None = None
    expected: Expected = NOTHING
    arrival: int = field(default_factory=lambda: next(_arrivals))
    sequences: list[Sequence] = field(default_factory=list)
    cached_tokens: int | None = None
    evicted_tokens: int = 0
    moved: tuple[Moved, ...] = ()
    written_tokens: int = 0
    completion_tokens: int = 0

    @property
    def usage(self) -> Usage:
        cached = self.cached_tokens or 0
        # Chunks that were published, evicted after a preemption and published again count once.
        written = min(self.written_tokens, len(self.prompt) - cached)
        return Usage(len(self.prompt), self.completion_tokens, cached, written, self.evicted_tokens, self.moved)

    @property
    def step_tokens(self) -> int | None:
        """How many tokens of the prompt one step may compute, where the others are held to be more urgent."""
        return self.tentative.step_tokens if self.tentative is not None and self.tentative.is_open else None

    def drop(self) -> bool:
        """Give it up, if it is tentative and was not kept; whether that is so."""
        return self.tentative is not None and self.tentative.drop()

    @property
    def is_finished(self) -> bool:
        return len(self.sequences) == self.params.n and all(s.finish_reason for s in self.sequences)


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice of a request. `looked_below`: its missing chunks were looked for in the tiers below the device."""

    request: Request
    index: int
    tokens: list[int]
    detokenizer: Detokenizer
    chooser: TokenChooser
    lease: Lease | None = None
    computed: int = 0
    moved: tuple[Moved, ...] = ()
    finish_reason: FinishReason | None = None
    overtaken: int = 0  # by how many that came later and started before it, while it waited
    looked_below: bool = False

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are not computed yet; 1 while decoding."""
        return len(self.tokens) - self.computed - sum(len(_after(m.kept, self.computed)) for m in self.moved)

    @property
    def first_logits(self) -> int:
        """The first position whose logits are still wanted; all before it may come from the cache.

        It is the last token's, unless the prompt's own log-probabilities are asked for and not all known.
        """
        scored = len(self.request.stream.prompt_logprobs)
        return scored - 1 if 0 < scored < len(self.request.prompt) else len(self.tokens) - 1

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def next_rows(self, count: int) -> tuple[range, ...]:
        """The positions of the next `count` tokens to compute, in runs between those that were moved."""
        runs, begin = [], self.computed
        for kept in (_after(m.kept, self.computed) for m in self.moved):
            if kept and count > 0:
                runs.append(range(begin, min(begin + count, kept.start)))
                count -= len(runs[-1])
                begin = kept.stop
        return tuple(run for run in (*runs, range(begin, begin + count)) if run)

    @property
    def order(self) -> tuple[int, int]:
        """First come, first served; the choices of one request stand together."""
        return (self.request.arrival, self.index)

    def drop_lease(self) -> None:
        """Give the slots back; full chunks stay cached, so taking up the sequence again is cheap."""
        if self.lease is not None:
            self.lease.release()
        self.lease, self.computed, self.moved, self.looked_below = None, 0, (), False


def _after(positions: range, begin: int) -> range:
    """Those of the positions that are not before `begin`."""
    return range(max(positions.start, begin), positions.stop)
