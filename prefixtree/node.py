"""A node of the prefix tree: one full chunk of tokens, at one position, after one history.

Invariant: the path of keys from the root spells the exact tokens whose keys and values lie in the nodes' slots.
"""

from __future__ import annotations

from collections.abc import Iterator


class Node:
    """One cached chunk; a root (`parent is None`) holds none and stands for the empty prefix of its namespace.

    Attributes:
        parent: the chunk before this one; None for a root.
        key: the chunk's tokens, encoded; for a root, the namespace's digest.
        slot: where the chunk lies in the pool; -1 for a root.
        depth: chunks from the root, this one included; 0 for a root.
        children: by key. Exact bytes, so no two different chunks can be taken for one another.
        order: the children's keys, sorted: where a longest common prefix is found by bisection.
        leases: how many holders pin this very node (holders further down do not count here).
        priority: the eviction policy's verdict; the smallest goes first.
        ticket: identifies this node's live entry in the tree's eviction heap; 0 if it has none.
    """

    __slots__ = ("children", "depth", "key", "leases", "order", "parent", "priority", "slot", "ticket")

    def __init__(self, parent: Node | None, key: bytes, slot: int) -> None:
        self.parent = parent
        self.key = key
        self.slot = slot
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[bytes, Node] = {}
        self.order: list[bytes] = []
        self.leases = 0
        self.priority = 0.0
        self.ticket = 0

    def upward(self) -> Iterator[Node]:
        """Yield this node and its ancestors, the root excluded: the chunks of the path, last one first."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def path_slots(self) -> list[int]:
        """Return the slots of the path, first chunk first."""
        slots = [node.slot for node in self.upward()]
        slots.reverse()
        return slots

    def __repr__(self) -> str:
        return f"Node(depth={self.depth}, slot={self.slot}, leases={self.leases}, children={len(self.children)})"
