"""PGDSF whose uses fade, with a gate: the engine's own policy.

Invariant: a chunk's `uses` and `history` are what they are worth at its `clock`, and that is never ahead of now.

    priority = clock + log2(uses * cost)      clock: half-lives that have passed

Both fade by half in a half-life, whether the chunk is cached or gone, so between two uses a chunk's priority stands
still and the order of any two chunks is that of `uses * cost`, faded to any moment. PGDSF as RAGCache has it
(`PGDSF`) ages by a clock that follows what was evicted last: what was used a hundred times and is not wanted any more
stays until things that were used as often have gone. Under drift that is a large part of the pool (docs/policies.md).

The gate: the use that brings a chunk in counts nothing. So who comes once leaves first and pushes out nobody who comes
often; a scan of new chunks pushes out nothing but itself. (TinyLFU, arXiv 1512.00727, compares newcomer and victim
instead, which a tree cannot do: the newcomer's slots are taken before it is known, and its victims are the leaves of
other paths.) RAGCache has no gate.
"""

from __future__ import annotations

import math
from typing import Final

from stemcache.prefixtree.errors import InvariantError
from stemcache.prefixtree.frequency import FrequencySketch
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.pgdsf import Cost, same_cost

# What an expected use is worth beside one that was seen, and all of them together at most. The bound is for documents
# that are asked for often, but with others that always come first. In simulation (three seeds, a half-life of four
# turnovers) with bounds of 0, 0.25, 0.5, 1 and none 16.7, 17.2, 17.3, 17.3 and 17.3 % of the documents are hit (k=5,
# drift, `cache` order), and 57.3, 57.3, 57.2, 57.1 and 55.1 % of the tokens (questions to a context cache, pool 0.1).
EXPECTED_WEIGHT: Final = 0.25
EXPECTED_MOST: Final = 0.5
# So much of a use is none. The gate takes back a whole one at the moment a chunk is read, and it is counted when the
# request ends: what fades in between, while others come and go, must not make one passer-by better than the next.
LEAST_USES: Final = 1 / 16
_WORTHLESS: Final = -math.inf


class FadingPGDSF:
    """Prefix-aware greedy dual, size, frequency, with uses that fade.

    Args:
        history: remembers the uses of chunks that are gone, so that one which comes back is known. Its age is the
            clock: a half-life has passed when it has counted so many uses of chunks that went.
        cost: what a token of a chunk costs to compute again, by its depth. Positive.
    """

    def __init__(self, history: FrequencySketch, cost: Cost = same_cost) -> None:
        self._history = history
        self._cost = cost

    @property
    def clock(self) -> float:
        """Half-lives that have passed."""
        return self._history.age

    def insert(self, node: Node, expected: float) -> float:
        known = self._history.estimate(node.digest)
        node.history = known + min(EXPECTED_MOST, EXPECTED_WEIGHT * max(0.0, expected - known)) - 1.0  # the gate
        node.clock = self.clock
        return self._priority(node)

    def touch(self, node: Node, uses: int) -> float:
        self._fade(node)
        node.uses += uses
        return self._priority(node)

    def inherit(self, parent: Node, child: Node) -> float:
        self._fade(parent)
        parent.uses += child.uses * 2.0 ** (child.clock - self.clock)
        return self._priority(parent)

    def evict(self, node: Node) -> None:
        if node.uses:
            self._fade(node)
            self._history.add(node.digest, node.uses)

    def check(self, node: Node) -> None:
        if node.uses < 0 or node.history < -1.0 or not node.clock <= self.clock or not node.priority < math.inf:
            raise InvariantError(
                f"fading pgdsf: {node} has {node.uses} uses, {node.history} before, clock {node.clock}"
            )

    def _fade(self, node: Node) -> None:
        """What was counted so far, as it is worth now."""
        share = 2.0 ** (node.clock - self.clock)
        node.uses *= share
        node.history *= share
        node.clock = self.clock

    def _priority(self, node: Node) -> float:
        counted = node.history + node.uses
        return node.clock + math.log2(counted * self._cost(node.depth)) if counted >= LEAST_USES else _WORTHLESS
