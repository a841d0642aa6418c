"""Eviction policies: which cached chunk is the least worth keeping.

Invariant: a policy only ranks. What may be evicted (unleased leaves) is the tree's business, so no policy can break a
lease or orphan a child.

Only leaves are ranked, and a use of a chunk is a use of the whole path to it. So a use is noted at the path's end only,
and handed up when that chunk goes (`inherit`): by the time a chunk is a leaf it has heard of all uses of its path.
"""

from __future__ import annotations

from typing import Protocol

from stemcache.prefixtree.errors import InvariantError
from stemcache.prefixtree.node import Node


class EvictionPolicy(Protocol):
    """What the tree asks of a policy. The tree keeps the answers in `node.priority` and evicts the smallest first.

    Of a node's attributes `uses`, `history` and `clock` belong to the policy. Every method is O(1), and one policy
    object serves one tree: each tier has its own, and so its own clock.
    """

    def insert(self, node: Node, expected: float) -> float:
        """Return the priority of a node that has just joined the tree. `touch` follows, at it or further down.

        `expected`: what `Expected` says of it, 0 if nothing.
        """
        ...

    def touch(self, node: Node, uses: int) -> float:
        """Return the new priority of a node at which `uses` uses have just ended: 0 if it was only read in part."""
        ...

    def inherit(self, parent: Node, child: Node) -> float:
        """Return the new priority of `parent`, which has just lost `child`: the child's uses were also its own."""
        ...

    def evict(self, node: Node) -> None:
        """Note that `node` goes, because others need room."""
        ...

    def check(self, node: Node) -> None:
        """Raise InvariantError if what the policy keeps of a cached chunk cannot be."""
        ...


class LRU:
    """Least recently used: the priority is the time of the last use, counted in touches."""

    def __init__(self) -> None:
        self._now = 0

    def insert(self, node: Node, expected: float) -> float:
        self._now += 1
        return float(self._now)  # exact up to 2**53 touches, centuries of them

    def touch(self, node: Node, uses: int) -> float:
        return self.insert(node, 0.0)

    def inherit(self, parent: Node, child: Node) -> float:
        return max(parent.priority, child.priority)

    def evict(self, node: Node) -> None:
        pass

    def check(self, node: Node) -> None:
        _require(0 < node.priority <= self._now, f"lru: {node} was used at {node.priority}, and now is {self._now}")


class LFU:
    """Least frequently used: the priority is the number of uses since it was cached; among equals, the oldest goes.

    Here for comparison. It never forgets, so what was popular once stays: under drift it loses to LRU.
    """

    def insert(self, node: Node, expected: float) -> float:
        return 0.0

    def touch(self, node: Node, uses: int) -> float:
        node.uses += uses
        return node.uses

    def inherit(self, parent: Node, child: Node) -> float:
        parent.uses += child.uses
        return parent.uses

    def evict(self, node: Node) -> None:
        pass

    def check(self, node: Node) -> None:
        _require(node.uses >= 0, f"lfu: {node} was used {node.uses} times")


def _require(condition: bool, broken: str) -> None:
    if not condition:
        raise InvariantError(broken)
