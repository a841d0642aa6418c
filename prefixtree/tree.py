"""The prefix tree: every cached chunk, under the exact tokens that lead to it.

Invariants (`check()` proves them):

1. A node's path spells its tokens; nodes and slots correspond one to one.
2. **A leased path is never evicted**, though only its deepest node is pinned. Eviction takes leaves without leases. The
   pinned node has a lease, so it stays; each ancestor has a child that stays, so it is not a leaf, so it stays. Hence
   acquiring and releasing are O(1), not O(path).
3. Exactly the unleased leaves stand in the eviction heap: every one once, with a valid ticket.
4. A root exists as long as something hangs on it, chunk or lease: namespaces that are gone cost nothing.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import islice

from stemcache.prefixtree.errors import InvariantError
from stemcache.prefixtree.eviction import LRU, EvictionPolicy
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.tokens import TOKEN_BYTES, common_tokens


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix: whole chunks up to `node`, then the first `partial_tokens` tokens of `partial`."""

    node: Node
    full_tokens: int
    partial: Node | None
    partial_tokens: int

    @property
    def tokens(self) -> int:
        return self.full_tokens + self.partial_tokens


class PrefixTree:
    """Chunks of `chunk_tokens` tokens, one tree per namespace. Tokens come encoded (`encode_tokens`)."""

    def __init__(self, chunk_tokens: int, policy: EvictionPolicy | None = None) -> None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
        self.chunk_tokens = chunk_tokens
        self._key_bytes = chunk_tokens * TOKEN_BYTES
        self._policy: EvictionPolicy = LRU() if policy is None else policy
        self._roots: dict[bytes, Node] = {}
        self._pinned: set[Node] = set()
        self._n_nodes = 0
        self._n_offered = 0
        self._last_ticket = 0
        self._heap: list[tuple[float, int, Node]] = []  # (priority, ticket, node); stale where the tickets differ

    def __len__(self) -> int:
        """Return the number of cached chunks."""
        return self._n_nodes

    def match(self, namespace: Namespace, tokens: bytes) -> Match:
        """Return the longest cached prefix of `tokens`. No side effects.

        An unknown namespace matches nothing; its root joins the tree when it is first pinned or inserted under.
        """
        root = self._roots.get(namespace.digest)
        node = Node(None, namespace.digest, -1) if root is None else root
        node = self.descend(node, tokens)
        begin = node.depth * self._key_bytes
        partial, partial_tokens = self._closest_child(node, tokens[begin : begin + self._key_bytes])
        return Match(node, node.depth * self.chunk_tokens, partial, partial_tokens)

    def descend(self, node: Node, tokens: bytes) -> Node:
        """Return the deepest node below `node` (or itself) whose path is a prefix of `tokens`, as `node`'s own is."""
        size = self._key_bytes
        begin = node.depth * size
        while (child := node.children.get(tokens[begin : begin + size])) is not None:
            node = child
            begin += size
        return node

    def next_key(self, node: Node, tokens: bytes) -> bytes | None:
        """Return the key of the chunk of `tokens` that follows `node`; None if the tokens end before it is full."""
        begin = node.depth * self._key_bytes
        key = tokens[begin : begin + self._key_bytes]
        return key if len(key) == self._key_bytes else None

    def keys_of(self, chunks: bytes, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the keys of the encoded `chunks`, a whole number of them, from byte `begin` to byte `end`."""
        for at in range(begin, len(chunks) if end is None else end, self._key_bytes):
            yield chunks[at : at + self._key_bytes]

    def insert(self, parent: Node, key: bytes, slot: int, expected: float = 0.0) -> Node:
        """Add the chunk `key`, which lies in `slot`, below `parent`, and return its node, pinned once for the caller.

        `expected`: how often it is known to have been asked for, though it was not here (`Expected`).

        Raises:
            ValueError: the key is not one chunk long, or the chunk is there already.
        """
        if len(key) != self._key_bytes:
            raise ValueError(f"a chunk has {self.chunk_tokens} tokens, not {len(key) // TOKEN_BYTES}")
        if key in parent.children:
            raise ValueError("this chunk is in the tree already")
        self._adopt(parent)
        self._withdraw(parent)
        node = Node(parent, key, slot)
        parent.children[key] = node
        insort(parent.order, key)
        self._n_nodes += 1
        node.root.n_chunks += 1
        node.priority = self._policy.insert(node, expected)
        node.used = time.monotonic()
        self.pin(node)
        return node

    def pin(self, node: Node) -> None:
        """Keep `node` and its whole path until `unpin`. Pins are counted."""
        self._adopt(node)
        self._withdraw(node)
        node.leases += 1
        self._pinned.add(node)

    def unpin(self, node: Node) -> None:
        """End one pin."""
        assert node.leases > 0, "unpinned more often than pinned"
        node.leases -= 1
        if not node.leases:
            self._pinned.discard(node)
            self._settle(node)

    def touch(self, node: Node, uses: int = 1) -> None:
        """Tell the policy that `node`'s path was used, 0 times if only in part. Ancestors learn of it as leaves."""
        if node.parent is None:
            return
        node.priority = self._policy.touch(node, uses)
        node.used = time.monotonic()
        if node.ticket:
            self._withdraw(node)
            self._settle(node)

    def evict(self, n: int) -> list[Node]:
        """Remove up to `n` chunks, the lowest priority first, and return them: fewer if the rest is leased.

        O(log chunks) each. A parent inherits its child's uses: using the child was using it.
        """
        evicted: list[Node] = []
        while len(evicted) < n and self._heap:
            _, ticket, node = heappop(self._heap)
            if node.ticket == ticket:
                self._policy.evict(node)
                self._remove(node)
                evicted.append(node)
        return evicted

    def evict_namespace(self, namespace: Namespace) -> list[Node]:
        """Remove every chunk of one namespace that is on no pinned path, and return them. O(its chunks)."""
        parents_first = list(self.newest_first(namespace))
        return [node for node in reversed(parents_first) if self._remove_if_free(node)]

    def evict_below(self, tops: Iterable[Node]) -> list[Node]:
        """Remove `tops` and every chunk below them that is on no pinned path, and return them. O(their chunks)."""
        found: set[Node] = set()
        stack = list(tops)
        while stack:
            node = stack.pop()
            if node not in found:  # one of the tops may lie below another
                found.add(node)
                stack.extend(node.children.values())
        return [node for node in sorted(found, key=lambda each: -each.depth) if self._remove_if_free(node)]

    def can_evict(self, n: int) -> bool:
        """Return whether `evict(n)` would free `n` chunks. O(1) if the leaves suffice, else O(leased chunks)."""
        return n <= self._n_offered or n <= self._n_nodes - self.n_sheltered()

    def n_sheltered(self, root: Node | None = None) -> int:
        """Return how many chunks, of `root`'s namespace or of all, lie on a pinned path. O(their number).

        Those are the chunks that cannot be evicted.
        """
        sheltered: set[Node] = set()
        for pinned in self._pinned:
            if root is not None and pinned.root is not root:
                continue
            for node in pinned.upward():
                if node in sheltered:
                    break
                sheltered.add(node)
        return len(sheltered)

    def root(self, namespace: Namespace) -> Node | None:
        """Return the root of a namespace; None if nothing hangs on it."""
        return self._roots.get(namespace.digest)

    def newest_first(self, namespace: Namespace, width: int | None = None) -> Iterator[Node]:
        """Yield the chunks of a namespace level by level, of each parent the latest inserted first, `width` at most.

        O(chunks taken): how many there are besides does not matter. The tree must not change meanwhile.
        """
        root = self.root(namespace)
        parents = deque([] if root is None else [root])
        while parents:
            for child in islice(reversed(parents.popleft().children.values()), width):
                yield child
                parents.append(child)

    def nodes(self) -> Iterator[Node]:
        """Yield every node, roots included, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Raise InvariantError naming the first broken invariant. O(chunks); for tests and idle moments."""
        nodes = list(self.nodes())
        chunks = [node for node in nodes if node.parent is not None]
        _require(len(chunks) == self._n_nodes, f"{len(chunks)} chunks reachable, {self._n_nodes} counted")
        _require(len({node.slot for node in chunks}) == len(chunks), "two chunks share a slot")
        for node in nodes:
            self._check_node(node)
        counted = sum(root.n_chunks for root in self._roots.values())
        _require(counted == self._n_nodes, f"the roots count {counted} chunks, the tree {self._n_nodes}")
        _require(self._pinned == {node for node in nodes if node.leases}, "the pinned set is not the leased nodes")
        offered = {node for node in chunks if not node.children and not node.leases}
        valid = [node for priority, ticket, node in self._heap if node.ticket == ticket and node.priority == priority]
        _require(len(valid) == self._n_offered == len(offered), "the heap's valid entries are not the unleased leaves")
        _require(set(valid) == offered, "the heap offers other nodes than the unleased leaves")

    def _check_node(self, node: Node) -> None:
        _require(node.leases >= 0, f"{node} has a negative lease count")
        _require(node.root is (node if node.parent is None else node.parent.root), f"{node} has a foreign root")
        _require(node.order == sorted(node.children), f"{node}: the sorted keys are not the children's")
        for key, child in node.children.items():
            _require(child.parent is node and child.key == key, f"{child} hangs under a wrong parent or key")
            _require(child.depth == node.depth + 1, f"{child} is not one deeper than its parent")
            _require(len(key) == self._key_bytes, f"{child} is not one chunk long")
        if node.parent is None:
            _require(bool(node.children) or node.leases > 0, f"{node} is a root on which nothing hangs")
            _require(self._roots.get(node.key) is node, f"{node} stands under another namespace")
        else:
            self._policy.check(node)
        expected = node.parent is not None and not node.children and not node.leases
        _require((node.ticket != 0) == expected, f"{node} is offered for eviction though it must not be, or is not")

    def _closest_child(self, node: Node, rest: bytes) -> tuple[Node | None, int]:
        """Return the child that shares most leading tokens with `rest`, and how many.

        In sorted order the keys with the longest common prefix stand next to where `rest` would be inserted.
        """
        index = bisect_left(node.order, rest)
        best: Node | None = None
        best_tokens = 0
        for key in node.order[max(0, index - 1) : index + 1]:
            shared = common_tokens(key, rest)
            if shared > best_tokens:
                best, best_tokens = node.children[key], shared
        return best, best_tokens

    def _adopt(self, node: Node) -> None:
        """Enter a root that `match` made for an unknown namespace."""
        if node.parent is None:
            known = self._roots.setdefault(node.key, node)
            assert known is node, "a root that was matched before its namespace was first pinned"

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None
        self._withdraw(leaf)
        del parent.children[leaf.key]
        del parent.order[bisect_left(parent.order, leaf.key)]
        self._n_nodes -= 1
        leaf.root.n_chunks -= 1
        if parent.parent is not None:
            parent.priority = self._policy.inherit(parent, leaf)
        parent.used = max(parent.used, leaf.used)
        self._settle(parent)

    def _remove_if_free(self, node: Node) -> bool:
        if node.children or node.leases:
            return False
        self._remove(node)
        return True

    def _settle(self, node: Node) -> None:
        """Offer an unleased leaf for eviction; forget a root on which nothing hangs any more."""
        if node.children or node.leases:
            return
        if node.parent is None:
            del self._roots[node.key]
            return
        self._last_ticket += 1
        self._n_offered += 1
        node.ticket = self._last_ticket
        heappush(self._heap, (node.priority, node.ticket, node))
        if len(self._heap) > 2 * self._n_nodes + 64:  # mostly stale: rebuilt at most once per as many pushes
            self._heap = [entry for entry in self._heap if entry[2].ticket == entry[1]]
            heapify(self._heap)

    def _withdraw(self, node: Node) -> None:
        """Take back an offer, if there is one. Its heap entry stays and is stale from now on."""
        if node.ticket:
            node.ticket = 0
            self._n_offered -= 1


def _require(condition: bool, broken: str) -> None:
    if not condition:
        raise InvariantError(f"tree: {broken}")
