"""Footprints: where in the tree something that was read begins, so that all that was computed from it can be found.

Invariant: every chunk whose keys and values depend on the tokens [start, stop) of a prompt lies at or below the chunks
that the footprint of these tokens marks: the children of one parent whose tokens begin with `head`. What depends on a
token comes after it, and in a tree of prefixes all that comes after lies below. So one footprint says it for all
prompts that begin alike, whatever follows the marked tokens in them; also for a last chunk that is not full yet, and
for chunks that nobody has computed yet.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node, chain_digest, path_digests
from stemcache.prefixtree.tokens import TOKEN_BYTES, encode_tokens
from stemcache.prefixtree.tree import PrefixTree


@dataclass(frozen=True, slots=True)
class Footprint:
    """The chunks of a namespace (its digest) below `parent` (a chunk's digest, `depth` chunks down) that begin so."""

    namespace: bytes
    parent: bytes
    depth: int
    head: bytes

    @classmethod
    def of(cls, prompt: Sequence[int], start: int, stop: int, namespace: Namespace, chunk_tokens: int) -> Footprint:
        """The footprint of the tokens [start, stop) of a prompt. O(start).

        Raises ValueError unless these are some of its tokens.
        """
        if not 0 <= start < stop <= len(prompt):
            raise ValueError(f"[{start}, {stop}) are no tokens of a prompt of {len(prompt)}")
        depth = start // chunk_tokens
        first = depth * chunk_tokens
        above = encode_tokens(prompt[:first])
        path = [namespace.digest, *path_digests(namespace.digest, above, chunk_tokens * TOKEN_BYTES)]
        head = encode_tokens(prompt[first : min(stop, first + chunk_tokens)])
        return cls(namespace.digest, path[-1], depth, head)


class Footprints:
    """Several footprints, to be looked for at once."""

    def __init__(self, footprints: Iterable[Footprint], chunk_tokens: int) -> None:
        self._key_bytes = chunk_tokens * TOKEN_BYTES
        self._at: dict[bytes, dict[bytes, list[Footprint]]] = {}  # by namespace and parent
        self._depth: dict[bytes, int] = {}  # of the deepest parent
        for each in footprints:
            self._at.setdefault(each.namespace, {}).setdefault(each.parent, []).append(each)
            self._depth[each.namespace] = max(each.depth, self._depth.get(each.namespace, 0))

    def marked(self, tree: PrefixTree) -> Iterator[tuple[Footprint, Node]]:
        """Yield each footprint with each chunk of the tree that it marks. O(chunks above the deepest)."""
        for namespace, parents in self._at.items():
            root = tree.root(Namespace(namespace))
            stack = [] if root is None else [root]
            while stack:
                node = stack.pop()
                for footprint in parents.get(node.digest, ()):
                    yield from ((footprint, child) for child in _beginning_with(node, footprint.head))
                if node.depth < self._depth[namespace]:
                    stack.extend(node.children.values())

    def in_prompt(self, prompt: Sequence[int], namespace: Namespace) -> list[Footprint]:
        """The footprints that a prompt has: it marks chunks of it, cached or not. O(tokens above the deepest)."""
        found: list[Footprint] = []
        parents = self._at.get(namespace.digest)
        if parents is None:
            return found
        size, digest = self._key_bytes, namespace.digest
        data = encode_tokens(prompt[: (self._depth[namespace.digest] + 1) * (size // TOKEN_BYTES)])
        for begin in range(0, len(data), size):
            key = data[begin : begin + size]
            found += [each for each in parents.get(digest, ()) if key.startswith(each.head)]
            digest = chain_digest(digest, key)
        return found


def _beginning_with(node: Node, head: bytes) -> Iterator[Node]:
    """The children whose tokens begin with `head`; in sorted order they stand together."""
    for key in node.order[bisect_left(node.order, head) :]:
        if not key.startswith(head):
            return
        yield node.children[key]
