"""The prefix store: what the engine talks to. Leases over one pool, with everything already read kept in a prefix tree.

Invariant: a lease's slots hold, at every committed position, the keys and values of exactly that prefix in exactly that
namespace; and free + cached + private slots are the whole pool (`check()`).

Not thread-safe: it belongs to the engine's thread. Pure Python over ints; the data is moved by `copy_tokens`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from stemcache.prefixtree.accounts import Lookup
from stemcache.prefixtree.below import ChunksBelow
from stemcache.prefixtree.corpus import PublicCorpus
from stemcache.prefixtree.errors import CapacityError, InvariantError
from stemcache.prefixtree.eviction import EvictionPolicy
from stemcache.prefixtree.explain import Explanation, explain
from stemcache.prefixtree.footprint import Footprint, Footprints
from stemcache.prefixtree.lease import Lease
from stemcache.prefixtree.ledger import CopyTokens, Ledger, Watcher
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.snapshot import TreeSnapshot, take_snapshot
from stemcache.prefixtree.tokens import encode_tokens
from stemcache.prefixtree.tree import Match

__all__ = ["Lease", "NamespaceStats", "Occupancy", "PrefixStore", "StoreStats"]


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A snapshot. Chunks and leases are counts at this moment, the others totals since the store was made.

    free + cached + private = total. `leased_chunks` are those that cannot be evicted: private, or cached and on the
    path of a lease or claim. `hit_tokens` and `miss_tokens` add up to all tokens that were acquired.
    """

    total_chunks: int
    free_chunks: int
    cached_chunks: int
    private_chunks: int
    leased_chunks: int
    leases: int
    claims: int
    acquires: int
    hit_tokens: int
    miss_tokens: int
    copied_tokens: int
    evicted_chunks: int
    deduplicated_chunks: int


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What the pool's chunks are used for. free + cached + private = total."""

    chunk_tokens: int
    total_chunks: int
    free_chunks: int
    cached_chunks: int
    private_chunks: int
    evicted_chunks: int


@dataclass(frozen=True, slots=True)
class NamespaceStats:
    """A snapshot of one namespace. Chunks and leases are counts at this moment, for the rest see `Account`."""

    cached_chunks: int
    private_chunks: int
    leased_chunks: int
    leases: int
    acquires: int
    hit_tokens: int
    evicted_tokens: int
    unfinished_tokens: int
    new_tokens: int
    evicted_chunks: int


class PrefixStore:
    """Keeps `n_chunks` slots of `chunk_tokens` tokens.

    Args:
        copy_tokens: called as `copy_tokens(source_slot, target_slot, n_tokens)`: copy the first n tokens' keys and
            values of all layers (`KVPool.copy_tokens`).
        policy: which chunk to evict first; LRU by default.
        watcher: who is told of chunks that come and go.
    """

    def __init__(
        self,
        n_chunks: int,
        chunk_tokens: int,
        copy_tokens: CopyTokens,
        policy: EvictionPolicy | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self._ledger = Ledger(n_chunks, chunk_tokens, copy_tokens, policy, watcher)
        self._leases: set[Lease] = set()
        self._corpus = PublicCorpus(self._ledger)

    def share(self, namespace: Namespace) -> None:
        """From now on what this namespace holds may be copied by all others: never one in which a user's text lies."""
        self._corpus.namespace = namespace

    @property
    def chunk_tokens(self) -> int:
        return self._ledger.tree.chunk_tokens

    def acquire(self, tokens: Sequence[int], namespace: Namespace) -> Lease:
        """Lease the longest cached prefix of `tokens`.

        Full chunks are shared. If the next chunk diverges inside a cached one, the tokens before that point are copied
        to a private slot, provided that a slot can be had; else they are just not cached. Pass `tokens[:-1]` where the
        last token's logits are needed: a fully cached prompt leaves nothing to compute.

        Raises:
            ValueError: a token id is not an integer from 0 to 2**32 - 1.
        """
        data = encode_tokens(tokens)
        with self._corpus.found(namespace, data) as match:
            if match.partial is None:
                lease = Lease(self._ledger, self._leases, match.node, [], match.full_tokens)
            else:
                lease = self._acquire_partial(match, match.partial)
        evicted = self._ledger.count_evicted(match.node, data)
        lease.lookup = Lookup.of(len(tokens), lease.cached_tokens, match.node.depth + evicted, self.chunk_tokens)
        self._ledger.count(namespace.digest, lease.lookup)
        if self._ledger.watcher is not None:
            self._ledger.watcher.used(match.node)
        return lease

    def pin(self, tokens: Sequence[int], namespace: Namespace) -> Lease:
        """Lease the whole chunks of `tokens` that are cached, and nothing else: they stay until it is released.

        Nothing is copied, and nothing counts as a hit or a miss. Raises ValueError as `acquire` does.
        """
        match = self._ledger.tree.match(namespace, encode_tokens(tokens))
        return Lease(self._ledger, self._leases, match.node, [], match.full_tokens)

    def has_room(self, n_chunks: int) -> bool:
        """Return whether leases could reserve so many more chunks now. No side effects; O(leased chunks) at most."""
        missing = n_chunks - self._ledger.slots.n_free
        return missing <= 0 or self._ledger.tree.can_evict(missing)

    def awaited(self, tokens: Sequence[int], namespace: Namespace) -> bool:
        """Return whether a lease is computing the next full chunk of `tokens` (`Lease.claim`). No side effects.

        If so, it pays to acquire later: the chunk will be there, and nothing is computed twice.
        """
        if not len(self._ledger.claims):  # the usual case, in which even encoding would be too much to do per step
            return False
        data = encode_tokens(tokens)
        return self._ledger.claims.holds(self._ledger.tree.match(namespace, data).node, data)

    def match_tokens(self, tokens: Sequence[int], namespace: Namespace) -> int:
        """Return how many tokens `acquire` would find cached. No side effects; recency is not touched."""
        data = encode_tokens(tokens)
        match = self._corpus.match(namespace, data) or self._ledger.tree.match(namespace, data)
        return match.tokens

    def explain(
        self, tokens: Sequence[int], namespace: Namespace, n_last: int = 0, others: Iterable[Namespace] = ()
    ) -> Explanation:
        """Return what `acquire` would find for `tokens`, and why each of the others is a miss. No side effects.

        Args:
            n_last: how many tokens at the end are computed in any case, and would not be passed to `acquire`.
            others: namespaces of the same owner, in which a miss may be cached all the same.

        Raises:
            ValueError: an id that is none, or `n_last` is negative or more than there are tokens.
        """
        if not 0 <= n_last <= len(tokens):
            raise ValueError(f"n_last must be from 0 to {len(tokens)}, the number of tokens, not {n_last}")
        return explain(self._ledger, self._corpus, namespace, encode_tokens(tokens), n_last, others)

    def snapshot(
        self,
        namespace: Namespace,
        max_chunks: int,
        *,
        max_depth: int | None = None,
        with_tokens: bool = False,
        below: ChunksBelow | None = None,
    ) -> TreeSnapshot:
        """Return a picture of up to `max_chunks` chunks of a namespace, down to `max_depth` chunks from its root.

        `with_tokens`: with the branches' tokens. `below`: what to draw besides. For the cost see `take_snapshot`.
        """
        leased = [lease.node for lease in self._leases if lease.node.root.key == namespace.digest]
        return take_snapshot(
            self._ledger.tree,
            ChunksBelow() if below is None else below,
            namespace,
            leased,
            max_chunks=max_chunks,
            max_depth=max_depth,
            with_tokens=with_tokens,
        )

    def clear(self, namespace: Namespace | None = None) -> int:
        """Evict every chunk, of one namespace or of all, that no lease holds; return how many it were."""
        if namespace is not None:
            return len(self._ledger.evict_namespace(namespace))
        return self._ledger.evict(len(self._ledger.tree))

    def marked(self, footprints: Iterable[Footprint]) -> list[tuple[Footprint, Node]]:
        """Return each footprint with each cached chunk that it marks. O(chunks of their namespaces)."""
        return list(Footprints(footprints, self.chunk_tokens).marked(self._ledger.tree))

    def evict_below(self, tops: Iterable[Node]) -> list[int]:
        """Evict these chunks and all below them that no lease holds; return the slots, which are free now."""
        return self._ledger.evict_below(tops)

    def evict_namespace(self, namespace: Namespace) -> list[int]:
        """Evict every chunk of a namespace that no lease holds; return the slots, which are free now."""
        return self._ledger.evict_namespace(namespace)

    def chunks(self, namespace: Namespace | None = None) -> Iterator[Node]:
        """Yield every cached chunk, of one namespace or of all, parents before children.

        The store must not change meanwhile.
        """
        nodes = self._ledger.tree.nodes() if namespace is None else self._ledger.tree.newest_first(namespace)
        return (node for node in nodes if node.parent is not None)

    def namespace_stats(self, namespace: Namespace) -> NamespaceStats:
        """Return a snapshot of one namespace. O(leased chunks)."""
        tree, account = self._ledger.tree, self._ledger.accounts.of(namespace.digest)
        root = tree.root(namespace)
        leases = [lease for lease in self._leases if lease.node.root is root]
        private = sum(len(lease.slots) - lease.node.depth for lease in leases)
        return NamespaceStats(
            cached_chunks=root.n_chunks if root is not None else 0,
            private_chunks=private,
            leased_chunks=private + (tree.n_sheltered(root) if root is not None else 0),
            leases=len(leases),
            acquires=account.acquires,
            hit_tokens=account.hit_tokens,
            evicted_tokens=account.evicted_tokens,
            unfinished_tokens=account.unfinished_tokens,
            new_tokens=account.new_tokens,
            evicted_chunks=account.evicted_chunks,
        )

    def stats(self) -> StoreStats:
        """Return a snapshot of the counters. O(leased chunks)."""
        ledger = self._ledger
        return StoreStats(
            total_chunks=ledger.slots.n_slots,
            free_chunks=ledger.slots.n_free,
            cached_chunks=len(ledger.tree),
            private_chunks=len(ledger.private),
            leased_chunks=len(ledger.private) + ledger.tree.n_sheltered(),
            leases=len(self._leases),
            claims=len(ledger.claims),
            acquires=ledger.counters.acquires,
            hit_tokens=ledger.counters.hit_tokens,
            miss_tokens=ledger.counters.miss_tokens,
            copied_tokens=ledger.counters.copied_tokens,
            evicted_chunks=ledger.counters.evicted_chunks,
            deduplicated_chunks=ledger.counters.deduplicated_chunks,
        )

    def occupancy(self) -> Occupancy:
        """Return a part of the snapshot. O(1), and the one method that other threads may call.

        They may see one number from before and the next from after a change.
        """
        ledger = self._ledger
        return Occupancy(
            chunk_tokens=ledger.tree.chunk_tokens,
            total_chunks=ledger.slots.n_slots,
            free_chunks=ledger.slots.n_free,
            cached_chunks=len(ledger.tree),
            private_chunks=len(ledger.private),
            evicted_chunks=ledger.counters.evicted_chunks,
        )

    def check(self) -> None:
        """Raise InvariantError naming the first broken invariant. O(pool); for tests and idle moments."""
        self._ledger.check()
        pins = Counter([lease.node for lease in self._leases] + self._ledger.claims.pins())
        for node in self._ledger.tree.nodes():
            if node.leases != pins.pop(node, 0):
                raise InvariantError(f"store: {node} has other pins than leases and claims on it")
        if pins:
            raise InvariantError(f"store: leases or claims hold nodes outside the tree: {list(pins)}")
        private = [slot for lease in self._leases for slot in lease.private_slots]
        if len(private) != len(set(private)) or set(private) != self._ledger.private:
            raise InvariantError("store: the leases' private slots are not the ledger's")
        for lease in self._leases:
            if lease.shared_slots != lease.node.path_slots():
                raise InvariantError(f"store: a lease at {lease.node} names other slots than its path")
            if not lease.node.depth <= lease.committed_tokens // self._ledger.tree.chunk_tokens:
                raise InvariantError(f"store: a lease at {lease.node} committed only {lease.committed_tokens} tokens")

    def _acquire_partial(self, match: Match, partial: Node) -> Lease:
        """Acquire with a copy of the tokens that match inside `partial`, or without it if there is no slot for them."""
        ledger = self._ledger
        ledger.tree.pin(partial)  # making room for the copy must not evict its source, nor the path to it
        try:
            tail = [ledger.copy(partial.slot, match.partial_tokens, after=None)]
            cached_tokens = match.tokens
        except CapacityError:
            tail, cached_tokens = [], match.full_tokens
        finally:
            ledger.tree.touch(partial, uses=0)  # the path up to it is a use of the lease
            ledger.tree.unpin(partial)
        return Lease(ledger, self._leases, match.node, tail, cached_tokens)
