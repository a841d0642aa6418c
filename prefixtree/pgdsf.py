"""PGDSF: keep what is asked for often and is dear to compute again; the policy of RAGCache (arXiv 2404.12457).

Invariant: the clock never runs backwards, and no chunk's own clock is ahead of it.

    priority = clock + uses * cost            clock := the highest priority evicted so far

`cost` is per token and depends on the depth, `uses` fade with the history that is kept of chunks that are gone, and
each chunk keeps the clock of its last use. So what was popular once falls behind as the clock moves, and a deep chunk,
which attends to more, outlives a shallow one that is asked for as often.

RAGCache's tree holds documents; here a document after those before it is a run of chunks with the same uses, which goes
from its last chunk to its first. Its cost per token is averaged over the requests that missed the document; here it is
that of the place, since a chunk's place says how much it attends to.

Here to compare with: the engine's own `pgdsf` is `FadingPGDSF`.
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
        history: remembers how often chunks that are gone were used, so that one which comes back is known. Without it
            the uses count from when the chunk was cached last, and a pool that turns over fast never learns much.
    """

    def __init__(self, cost: Cost = same_cost, history: FrequencySketch | None = None) -> None:
        self.clock = 0.0
        self._cost = cost
        self._history = history

    def insert(self, node: Node, expected: float) -> float:
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
        return node.clock + (node.history + node.uses) * self._cost(node.depth)
