"""PGDSF: keep what is asked for often and is dear to compute again; the policy of RAGCache (arXiv 2404.12457).

Invariant: the clock never runs backwards, and no chunk's own clock is ahead of it.

    priority = clock + uses * cost            clock := the highest priority evicted so far

`uses` counts since the chunk was cached, `cost` is per token and depends on the depth, and each chunk keeps the clock
of its last use. So what was popular once falls behind as the clock moves, and a deep chunk, which attends to more,
outlives a shallow one that is asked for as often.

RAGCache's tree holds documents; here a document after those before it is a run of chunks with the same uses, which goes
from its last chunk to its first. Its cost per token is averaged over the requests that missed the document; here it is
that of the place, since a chunk's place says how much it attends to.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from stemcache.prefixtree.errors import InvariantError
from stemcache.prefixtree.frequency import FrequencySketch
from stemcache.prefixtree.node import Node

Cost = Callable[[int], float]  # of a depth in chunks, 1 for the first: seconds per token, in any unit


def same_cost(depth: int) -> float:
    """As if every token cost the same. PGDSF is then LFU with ageing."""
    return 1.0


class PGDSF:
    """Prefix-aware greedy dual, size, frequency.

    Args:
        cost: what a token of a chunk costs to compute again, by its depth. Positive.
        history: remembers how often chunks that are gone were used. With it the policy is also a gate against passers-
            by: a use counts from the second on, over all the time that the history remembers. A chunk that comes for
            the first time is worth nothing until it is asked for again, so it leaves before anything that was, and,
            leaving, does not move the clock: a scan of new chunks pushes out nothing but itself. RAGCache has no gate.
    """

    def __init__(self, cost: Cost = same_cost, history: FrequencySketch | None = None) -> None:
        self.clock = 0.0
        self._cost = cost
        self._history = history

    def insert(self, node: Node) -> float:
        if self._history is not None:
            node.history = self._history.estimate(node.digest)
        return self.touch(node, 0)

    def touch(self, node: Node, uses: int) -> float:
        node.uses += uses
        node.clock = self.clock
        return self._priority(node)

    def inherit(self, parent: Node, child: Node) -> float:
        parent.uses += child.uses
        parent.clock = max(parent.clock, child.clock)
        return self._priority(parent)

    def evict(self, node: Node) -> None:
        self.clock = max(self.clock, node.priority)
        if self._history is not None and node.uses:
            self._history.add(node.digest, node.uses)

    def check(self, node: Node) -> None:
        if node.uses < 0 or not 0.0 <= node.clock <= self.clock or not node.clock <= node.priority < math.inf:
            raise InvariantError(f"pgdsf: {node} has {node.uses} uses, clock {node.clock}, priority {node.priority}")

    def _priority(self, node: Node) -> float:
        counted = node.uses if self._history is None else max(0.0, node.history + node.uses - 1)
        return node.clock + counted * self._cost(node.depth)
