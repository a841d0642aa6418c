"""Eviction policies: which cached chunk is the least worth keeping.

Invariant: a policy only ranks. What may be evicted (unleased leaves) is the tree's business, so no policy can break a
lease or orphan a child.
"""

from __future__ import annotations

from typing import Protocol

from stemcache.prefixtree.node import Node


class EvictionPolicy(Protocol):
    """What the tree asks of a policy. The tree keeps the answer in `node.priority` and evicts the smallest first."""

    def touch(self, node: Node) -> float:
        """Return the new priority of a node that was just inserted, or whose use by a lease just ended."""
        ...


class LRU:
    """Least recently used: the priority is the time of the last use, counted in touches."""

    def __init__(self) -> None:
        self._now = 0

    def touch(self, node: Node) -> float:
        self._now += 1
        return float(self._now)  # exact up to 2**53 touches, centuries of them
