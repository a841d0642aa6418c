"""Claims: which chunks are being computed right now, so that nobody computes them a second time.

Invariant: a claimed chunk is not in the tree, the node it will hang under is pinned, and it has one claimant.
"""

from __future__ import annotations

from dataclasses import dataclass

from stemcache.prefixtree.errors import InvariantError
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.tree import PrefixTree

Chunk = tuple[Node, bytes]  # the node it hangs under, its key


@dataclass(eq=False, slots=True)
class Claim:
    """One claimant's announcement that it computes `prompt` (encoded), chunk after chunk.

    `chunk` is the one it holds at present: None if the prompt has no full chunk left, or another claimant holds it.
    """

    prompt: bytes
    chunk: Chunk | None = None


class Claims:
    """All claims on chunks of one tree."""

    def __init__(self, tree: PrefixTree) -> None:
        self._tree = tree
        self._holders: dict[Chunk, Claim] = {}

    def __len__(self) -> int:
        """Return the number of claimed chunks."""
        return len(self._holders)

    def holds(self, node: Node, prompt: bytes) -> bool:
        """Return whether the full chunk that follows `node` in `prompt` is claimed."""
        return self.holder(node, prompt) is not None

    def holder(self, node: Node, prompt: bytes) -> Claim | None:
        """Return the claim on the full chunk that follows `node` in `prompt`; None if there is none."""
        key = self._tree.next_key(node, prompt)
        return None if key is None else self._holders.get((node, key))

    def advance(self, claim: Claim, node: Node) -> None:
        """Move `claim` to its prompt's first full chunk at or below `node` that is not cached, if it can be had."""
        self.drop(claim)
        node = self._tree.descend(node, claim.prompt)
        key = self._tree.next_key(node, claim.prompt)
        if key is None or (node, key) in self._holders:
            return
        self._tree.pin(node)  # or the path to the claimed chunk could be evicted, and the claim name nothing
        claim.chunk = (node, key)
        self._holders[claim.chunk] = claim

    def published(self, node: Node) -> None:
        """Note that `node` has just joined the tree: whoever claimed it, its publisher or not, moves on."""
        assert node.parent is not None
        claim = self._holders.get((node.parent, node.key))
        if claim is not None:
            self.advance(claim, node)

    def drop(self, claim: Claim) -> None:
        """Let go of the chunk that `claim` holds, if any."""
        if claim.chunk is not None:
            del self._holders[claim.chunk]
            self._tree.unpin(claim.chunk[0])
            claim.chunk = None

    def pins(self) -> list[Node]:
        """Return the pinned nodes, one per claim."""
        return [node for node, _ in self._holders]

    def check(self) -> None:
        """Raise InvariantError if a claimed chunk is in the tree, its node is unpinned, or its claimant disagrees."""
        for (node, key), claim in self._holders.items():
            if key in node.children:
                raise InvariantError(f"claims: the chunk claimed below {node} is in the tree")
            if not node.leases:
                raise InvariantError(f"claims: the claim below {node} does not pin it")
            if claim.chunk != (node, key):
                raise InvariantError(f"claims: the claimant of the chunk below {node} holds another")
