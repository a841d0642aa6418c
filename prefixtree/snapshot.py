"""A snapshot: a bounded picture of one namespace's tree, for people to look at.

Invariant: as many chunks are walked as are shown, however large the tree is; nothing outside the namespace is seen.

Chunks that form an unbranched chain with the same leases are drawn as one `Branch`, as attention reads them. What lies
only in a tier below the device hangs where it hung when it was on the device.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Final

from stemcache.prefixtree.below import ChunksBelow
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.tokens import decode_tokens
from stemcache.prefixtree.tree import PrefixTree

_NO_SLOT: Final = -1


@dataclass(frozen=True, slots=True)
class Branch:
    """A chain of chunks in one place, with the same leases, of which each but the last has exactly one child.

    Attributes:
        id: 16 hexadecimal digits that name its first chunk, the same in every snapshot.
        parent: the id of the branch that it hangs on; None at the top.
        depth: chunks before it.
        chunks: how many it is made of.
        is_below: whether they are not on the device, but were handed to a tier below, which may have lost them since.
        stored_chunks: how many of them were handed to a tier below, or came from one; all if `is_below`.
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
    is_below: bool
    stored_chunks: int
    sharers: int
    children: int
    hidden_children: int
    idle_seconds: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TreeSnapshot:
    """Branches, parents before children, and what they were cut from.

    `cached_chunks` counts the namespace's chunks on the device, `children` those at the top, there or below,
    `hidden_children` those of them that are not shown.
    """

    chunk_tokens: int
    cached_chunks: int
    children: int
    hidden_children: int
    branches: tuple[Branch, ...]

    @property
    def shown_chunks(self) -> int:
        """How many of the `cached_chunks` are in the branches."""
        return sum(branch.chunks for branch in self.branches if not branch.is_below)

    @property
    def below_chunks(self) -> int:
        """How many other chunks are in the branches: those that lie only below the device."""
        return sum(branch.chunks for branch in self.branches if branch.is_below)


def take_snapshot(
    tree: PrefixTree,
    below: ChunksBelow,
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
    Chunks that lie only in a tier below are left a quarter of the room, and what the others do not need.
    O(max_chunks + leased chunks + chunks below that are children of what is shown).
    """
    root = tree.root(namespace) or Node(None, namespace.digest, -1)
    width = max(8, max_chunks // 8)
    cached = list(islice(tree.newest_first(namespace, width), max_chunks))
    if max_depth is not None:
        cached = list(takewhile(lambda node: node.depth <= max_depth, cached))
    above = cached[: max_chunks - max_chunks // 4]
    lower = list(islice(_walk_below(below, [root, *above], width, max_depth), max_chunks - len(above)))
    chunks = cached[: max_chunks - len(lower)] + lower
    n_children = {node: len(node.children) + sum(1 for _ in _only_below(below, node)) for node in (root, *chunks)}
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
            is_below=_is_below(last),
            stored_chunks=sum(node in stored for node in chain),
            sharers=sharers[last],
            children=n_children[last],
            hidden_children=n_children[last] - shown[last],
            idle_seconds=0.0 if sharers[last] else max(0.0, now - used[last]),
            token_ids=tuple(token for node in chain for token in decode_tokens(node.key)) if with_tokens else (),
        )

    chains = _chains(chunks, sharers, n_children)
    id_of_last = {chain[-1]: _id(chain[0]) for chain in chains}
    branches = tuple(branch(chain, id_of_last.get(_parent(chain[0]))) for chain in chains)
    return TreeSnapshot(tree.chunk_tokens, root.n_chunks, n_children[root], n_children[root] - shown[root], branches)


def _walk_below(below: ChunksBelow, parents: Iterable[Node], width: int, max_depth: int | None) -> Iterator[Node]:
    """Yield the chunks that hang on `parents` and lie only below, each before its own children, as nodes of no tree."""
    waiting = deque(parents)
    while waiting:
        parent = waiting.popleft()
        if parent.depth == max_depth:
            continue
        for key, used in islice(_only_below(below, parent), width):
            node = Node(parent, key, _NO_SLOT)
            node.used = used
            yield node
            waiting.append(node)


def _only_below(below: ChunksBelow, parent: Node) -> Iterator[tuple[bytes, float]]:
    """Yield key and last use of the children of `parent` that are not on the device, the latest evicted first."""
    found = below.children(parent.digest)
    return ((key, used) for key, used in reversed(found.items()) if key not in parent.children)


def _is_below(node: Node) -> bool:
    return node.slot == _NO_SLOT


def _chains(chunks: Iterable[Node], sharers: Counter[Node], n_children: Mapping[Node, int]) -> list[list[Node]]:
    """Join chunks, parents before children, into chains."""
    chain_of: dict[Node, list[Node]] = {}
    chains = []
    for node in chunks:
        parent = _parent(node)
        chain = chain_of.get(parent)
        alike = sharers[node] == sharers[parent] and _is_below(node) == _is_below(parent)
        if chain is not None and n_children[parent] == 1 and alike:
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
    """The chunks of which a copy was handed to a tier below. Parents come before children in `chunks`.

    An object holds up to eight chunks and only the last of them is marked; whatever a stored chunk follows was stored
    before it. Of what lies only below that cannot be told: it goes before its parents are stored.
    """
    stored: set[Node] = set()
    for node in reversed(chunks):
        if _is_below(node):
            stored.add(node)
        elif node.is_cold or node.is_covered or node in stored:
            stored |= {node, _parent(node)}
    return stored


def _parent(node: Node) -> Node:
    assert node.parent is not None, "a root is no chunk"
    return node.parent


def _id(node: Node) -> str:
    return node.digest[:8].hex()
