"""A node of the prefix tree: one full chunk of tokens, at one position, after one history.

Invariant: the path of keys from the root spells the exact tokens whose keys and values lie in the nodes' slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator


def chain_digest(parent: bytes, key: bytes) -> bytes:
    """Return the 32 bytes that name the chunk `key` after the path that `parent` names: SHA-256 of both.

    Both have a fixed length within a namespace, so putting them together is unambiguous.
    """
    return hashlib.sha256(parent + key).digest()


def path_digests(parent: bytes, chunks: bytes, key_bytes: int) -> Iterator[bytes]:
    """Yield the names of encoded chunks of `key_bytes` bytes that follow each other after the path named `parent`."""
    for start in range(0, len(chunks), key_bytes):
        parent = chain_digest(parent, chunks[start : start + key_bytes])
        yield parent


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
        used: when it was inserted or last used as the end of a path, on the monotonic clock; 0 for a root.
        root: the root of its namespace; a root's own is itself.
        n_chunks: for a root, the cached chunks of its namespace; 0 for others.
        uses, history, clock: the eviction policy's notes. `uses` ended here, or at children that are gone.
        is_cold: whether it was handed to the cold tier, or came from a tier. Kept by whoever spills (engine/spill.py).
        is_covered: whether a tier was handed an object that holds this chunk together with later ones. As above.
    """

    __slots__ = (
        "_digest",
        "children",
        "clock",
        "depth",
        "history",
        "is_cold",
        "is_covered",
        "key",
        "leases",
        "n_chunks",
        "order",
        "parent",
        "priority",
        "root",
        "slot",
        "ticket",
        "used",
        "uses",
    )

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
        self.used = 0.0
        self.root: Node = self if parent is None else parent.root
        self.n_chunks = 0
        self.uses = 0.0
        self.history = 0.0
        self.clock = 0.0
        self.is_cold = False
        self.is_covered = False
        self._digest: bytes | None = key if parent is None else None

    @property
    def digest(self) -> bytes:
        """The name of this chunk at this place: `chain_digest` from the namespace's digest down. Computed once.

        Nothing on the way of a request needs it, so it is not computed when the node is made.
        """
        node, path = self, []
        while node._digest is None:
            path.append(node)
            assert node.parent is not None
            node = node.parent
        digest = node._digest
        for node in reversed(path):
            digest = node._digest = chain_digest(digest, node.key)
        return digest

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
