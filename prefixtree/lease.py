"""The lease: one sequence's hold on the chunks it attends to.

Invariant: `slots` is the tree path of the lease's node, which it pins, followed by private slots that nobody else sees:

    slots    [0 .. node.depth)   shared   full chunks in the tree, read-only
             [node.depth .. )    private  written by this sequence; `commit` moves full ones to the shared part
    tokens   [0, cached_tokens)           were there when the lease began
             [0, committed_tokens)        have their keys and values in the slots
             [0, capacity_tokens)         have a place
             [private_from, ..)           are never published (`keep_private`)
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from stemcache.prefixtree.accounts import Lookup
from stemcache.prefixtree.claims import Claim
from stemcache.prefixtree.errors import CapacityError, StoreError
from stemcache.prefixtree.expected import NOTHING
from stemcache.prefixtree.ledger import Ledger
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.tokens import encode_tokens


class Lease:
    """Made by `PrefixStore.acquire` and `fork`, ended by `release` or by leaving its `with` block. Not thread-safe.

    Attributes:
        cached_tokens: how many leading tokens need not be computed.
        lookup: what its prompt found; None for a fork and a pin, which nobody looked up.
        expected: how often its prompt's prefixes were asked for, as far as its owner knows; for the eviction policy.
        written_tokens: how many tokens this lease computed and was the first to publish.
        slots: chunk ids in order, shared ones first. The caller reads it and never changes it; `commit` may replace an
            entry (the chunk turned out to exist already), `reserve` appends. Empty once released.
    """

    def __init__(self, ledger: Ledger, live: set[Lease], node: Node, tail: list[int], cached_tokens: int) -> None:
        """Pin `node` and take over the private slots `tail`. `live` is the store's set of leases, kept up to date."""
        ledger.tree.pin(node)
        live.add(self)
        self.cached_tokens = cached_tokens
        self.lookup: Lookup | None = None
        self.expected = NOTHING
        self.written_tokens = 0
        self.slots = node.path_slots() + tail
        self._ledger = ledger
        self._live = live
        self._node = node
        self._committed = cached_tokens
        self._private_from: int | None = None
        self._claim: Claim | None = None

    @property
    def node(self) -> Node:
        """The deepest tree node on this sequence's path."""
        return self._node

    @property
    def shared_slots(self) -> list[int]:
        return self.slots[: self._node.depth]

    @property
    def private_slots(self) -> list[int]:
        return self.slots[self._node.depth :]

    @property
    def evicted_tokens(self) -> int:
        """How many of the tokens that follow the cached ones had been cached here, and were evicted."""
        return 0 if self.lookup is None else self.lookup.evicted

    @property
    def capacity_tokens(self) -> int:
        return len(self.slots) * self._ledger.tree.chunk_tokens

    @property
    def committed_tokens(self) -> int:
        return self._committed

    @property
    def released(self) -> bool:
        return self not in self._live

    def keep_private(self, position: int) -> None:
        """Publish nothing from `position` on, ever: what will lie there is not what the prefix gives.

        Raises:
            ValueError: what lies there is published already.
            StoreError: the lease was released.
        """
        self._require_live()
        n_published = self._node.depth * self._ledger.tree.chunk_tokens
        if position < n_published:
            raise ValueError(f"position {position} cannot be kept private: {n_published} tokens are published")
        self._private_from = position if self._private_from is None else min(position, self._private_from)

    def reserve(self, n_tokens: int) -> None:
        """Hold slots for the positions [0, n_tokens), as a run after the last slot where possible.

        Raises:
            CapacityError: the pool cannot hold that many, even after eviction. Nothing has changed then.
            StoreError: the lease was released.
        """
        self._require_live()
        missing = self._chunks(n_tokens) - len(self.slots)
        if missing > 0:
            self.slots += self._ledger.take(missing, after=self.slots[-1] if self.slots else None)

    def claim(self, tokens: Sequence[int]) -> None:
        """Announce that this lease will compute `tokens`, its whole prompt.

        Its first full chunk that is not cached is claimed, unless another lease claimed it. As chunks are committed the
        claim moves on through the prompt; it ends with the lease. A second call replaces the first.

        Raises:
            StoreError: the lease was released.
        """
        self._require_live()
        claim = Claim(encode_tokens(tokens[: self._private_from]))
        self._drop_claim()
        self._claim = claim
        self._ledger.claims.advance(self._claim, self._node)

    def commit(self, tokens: Sequence[int]) -> None:
        """Publish every chunk that is now full and not kept private: the keys and values of `tokens` are in the slots.

        Where an equal chunk was published meanwhile, ours is freed and `slots` names theirs. O(new chunks): tokens that
        are published already are not looked at, so a decode step can call this for every token.

        Args:
            tokens: the whole sequence so far. It must extend what was acquired and committed before: the caller's
                promise, unchecked, for checking would read all of it each time.

        Raises:
            ValueError: fewer tokens than were committed before, more than `capacity_tokens`, or an id that is none.
            StoreError: the lease was released.
        """
        self._require_live()
        n_tokens = len(tokens)
        if not self._committed <= n_tokens <= self.capacity_tokens:
            raise ValueError(
                f"commit of {n_tokens} tokens: {self._committed} are committed, {self.capacity_tokens} have a slot"
            )
        size = self._ledger.tree.chunk_tokens
        n_published = self._node.depth * size
        n_public = n_tokens if self._private_from is None else min(n_tokens, self._private_from)
        if n_public - n_published >= size:
            self._publish(encode_tokens(tokens[n_published : n_public - n_public % size]))
        self._committed = n_tokens

    def fork(self, n_tokens: int) -> Lease:
        """Return a second lease on the first `n_tokens` tokens of this one. Published chunks are shared, others copied.

        Raises:
            ValueError: more tokens than are committed, or a negative number.
            CapacityError: no slots for the copies. Nothing has changed then, except for what was evicted.
            StoreError: the lease was released.
        """
        self._require_live()
        if not 0 <= n_tokens <= self._committed:
            raise ValueError(f"fork at {n_tokens} tokens: {self._committed} are committed")
        size = self._ledger.tree.chunk_tokens
        node = self._node  # every full committed chunk that may be is in the tree, so the fork's node is on this path
        while node.depth > n_tokens // size and node.parent is not None:
            node = node.parent
        tail: list[int] = []
        try:
            for depth in range(node.depth, self._chunks(n_tokens)):
                count = min(size, n_tokens - depth * size)
                tail.append(self._ledger.copy(self.slots[depth], count, after=tail[-1] if tail else None))
        except CapacityError:
            self._ledger.drop(tail)
            raise
        fork = Lease(self._ledger, self._live, node, tail, n_tokens)
        fork._private_from = self._private_from
        return fork

    def release(self, *, used: bool = True) -> None:
        """End the hold: committed full chunks stay cached, private slots are freed. Does nothing the second time.

        used: whether it was a use of what is cached, which eviction by frequency and the accounts count. A request that
            could not start comes back until it can, and would count each time.
        """
        if self.released:
            return
        self._live.remove(self)
        if not used and self.lookup is not None:
            self._ledger.count(self._node.root.key, self.lookup, times=-1)
        self._drop_claim()
        self._ledger.drop(self.private_slots)
        self._ledger.tree.touch(self._node, uses=int(used))
        if self._ledger.watcher is not None:
            self._ledger.watcher.released(self._node)
        self._ledger.tree.unpin(self._node)
        self.slots = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _publish(self, chunks: bytes) -> None:
        """Move the first private chunks, whose tokens are `chunks`, to the shared part."""
        size = self._ledger.tree.chunk_tokens
        for key in self._ledger.tree.keys_of(chunks):
            parent, slot = self._node, self.slots[self._node.depth]
            self._node = self._ledger.publish(parent, key, slot, self.expected.of((parent.depth + 1) * size))
            if self._node.slot == slot:  # not found to exist already
                self.written_tokens += size - max(0, self.cached_tokens - parent.depth * size)
            self.slots[parent.depth] = self._node.slot
            self._ledger.tree.unpin(parent)
        if self._claim is not None and self._claim.chunk is None:  # it was another's, who may have given up
            self._ledger.claims.advance(self._claim, self._node)

    def _drop_claim(self) -> None:
        if self._claim is not None:
            self._ledger.claims.drop(self._claim)
            self._claim = None

    def _chunks(self, n_tokens: int) -> int:
        return -(-n_tokens // self._ledger.tree.chunk_tokens)

    def _require_live(self) -> None:
        if self.released:
            raise StoreError("the lease was released")
