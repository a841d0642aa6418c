"""A snapshot: a bounded picture of one namespace's tree, for people to look at.

Invariant: as many chunks are walked as are shown, however large the tree is; nothing outside the namespace is seen.

Chunks that form an unbranched chain with the same leases are drawn as one `Branch`, as attention reads them.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.tokens import decode_tokens
from stemcache.prefixtree.tree import PrefixTree


@dataclass(frozen=True, slots=True)
class Branch:
    """A chain of chunks of which each but the last has exactly one child, and all have the same leases.

    Attributes:
        id: 16 hexadecimal digits that name its first chunk, the same in every snapshot.
        parent: the id of the branch that it hangs on; None at the top.
        depth: chunks before it.
        chunks: how many it is made of.
        stored_chunks: how many of them were handed to the cold tier, or came from a tier; it may have lost them since.
        sharers: leases that hold it: on its last chunk or below.
        children: chunks that hang on its last one.
        hidden_children: those of them that are not in the snapshot.
        idle_seconds: time since it was last used, as far as it and what is shown below it tell; 0 while it is leased.
        token_ids: its tokens; empty unless they were asked for.
    """

    id: str
    parent: str | None
    depth: int
    chunks: int
    stored_chunks: int
    sharers: int
    children: int
    hidden_children: int
    idle_seconds: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TreeSnapshot:
    """Branches, parents before children, and what they were cut from.

    `cached_chunks` counts the namespace's chunks, `children` those at the top, `hidden_children` those of them that are
    not shown.
    """

    chunk_tokens: int
    cached_chunks: int
    children: int
    hidden_children: int
    branches: tuple[Branch, ...]

    @property
    def shown_chunks(self) -> int:
        return sum(branch.chunks for branch in self.branches)


def take_snapshot(
    tree: PrefixTree,
    namespace: Namespace,
    leased: Iterable[Node],
    *,
    max_chunks: int,
    max_depth: int | None,
    with_tokens: bool,
) -> TreeSnapshot:
    """Draw up to `max_chunks` chunks, level by level, of each parent the latest inserted children.

    leased: the deepest node of every lease in this namespace.
    One parent shows an eighth of `max_chunks` children at most, so that a wide level leaves room for those below it.
    O(max_chunks + leased chunks).
    """
    root = tree.root(namespace)
    if root is None:
        return TreeSnapshot(tree.chunk_tokens, 0, 0, 0, ())
    walk = tree.newest_first(namespace, width=max(8, max_chunks // 8))
    chunks = list(islice(walk, max_chunks))
    if max_depth is not None:
        chunks = list(takewhile(lambda node: node.depth <= max_depth, chunks))
    sharers, used, stored = _sharers(leased), _last_used(chunks), _stored(chunks)
    shown = Counter(node.parent for node in chunks)
    now = time.monotonic()

    def branch(chain: Sequence[Node], parent: str | None) -> Branch:
        last = chain[-1]
        return Branch(
            id=_id(chain[0]),
            parent=parent,
            depth=chain[0].depth - 1,
            chunks=len(chain),
            stored_chunks=sum(node in stored for node in chain),
            sharers=sharers[last],
            children=len(last.children),
            hidden_children=len(last.children) - shown[last],
            idle_seconds=0.0 if sharers[last] else max(0.0, now - used[last]),
            token_ids=tuple(token for node in chain for token in decode_tokens(node.key)) if with_tokens else (),
        )

    chains = _chains(chunks, sharers)
    id_of_last = {chain[-1]: _id(chain[0]) for chain in chains}
    branches = tuple(branch(chain, id_of_last.get(_parent(chain[0]))) for chain in chains)
    hidden = len(root.children) - shown[root]
    return TreeSnapshot(tree.chunk_tokens, root.n_chunks, len(root.children), hidden, branches)


def _chains(chunks: Iterable[Node], sharers: Counter[Node]) -> list[list[Node]]:
    """Join chunks, parents before children, into chains."""
    chain_of: dict[Node, list[Node]] = {}
    chains = []
    for node in chunks:
        parent = _parent(node)
        chain = chain_of.get(parent)
        if chain is not None and len(parent.children) == 1 and sharers[node] == sharers[parent]:
            chain.append(node)
        else:
            chain = [node]
            chains.append(chain)
        chain_of[node] = chain
    return chains


def _sharers(leased: Iterable[Node]) -> Counter[Node]:
    """Count the leases on or below every leased chunk: from the deepest level up, so that each is visited once."""
    sharers = Counter(leased)
    levels: defaultdict[int, set[Node]] = defaultdict(set)
    for node in sharers:
        levels[node.depth].add(node)
    for depth in range(max(levels, default=0), 0, -1):
        for node in levels[depth]:
            sharers[_parent(node)] += sharers[node]
            levels[depth - 1].add(_parent(node))
    return sharers


def _last_used(chunks: Sequence[Node]) -> dict[Node, float]:
    """When each chunk was used last: itself, or one below it. Parents come before children in `chunks`."""
    used = {node: node.used for node in chunks}
    for node in reversed(chunks):
        parent = _parent(node)
        if parent in used:
            used[parent] = max(used[parent], used[node])
    return used


def _stored(chunks: Sequence[Node]) -> set[Node]:
    """The chunks of which a copy was handed to the cold tier. Parents come before children in `chunks`.

    An object holds up to eight chunks and only the last of them is marked; whatever a stored chunk follows was stored
    before it.
    """
    stored: set[Node] = set()
    for node in reversed(chunks):
        if node.is_cold or node.is_covered or node in stored:
            stored |= {node, _parent(node)}
    return stored


def _parent(node: Node) -> Node:
    assert node.parent is not None, "a root is no chunk"
    return node.parent


def _id(node: Node) -> str:
    return node.digest[:8].hex()
