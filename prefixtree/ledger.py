"""The ledger: who owns each slot of the pool.

Invariant: every slot is exactly one of free (allocator), cached (tree) or private (held by one lease).

    free --take--> private --publish--> cached --evict--> free
                   private --drop-----------------------> free
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from stemcache.prefixtree.accounts import Accounts, Lookup
from stemcache.prefixtree.claims import Claims
from stemcache.prefixtree.errors import CapacityError, InvariantError
from stemcache.prefixtree.evicted import EvictedChunks
from stemcache.prefixtree.eviction import EvictionPolicy
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.slots import SlotAllocator
from stemcache.prefixtree.tokens import TOKEN_BYTES
from stemcache.prefixtree.tree import PrefixTree

# A full pool is evicted a sixteenth at a time, not slot by slot, so that what is freed can be handed out in runs. In a
# simulated serving load (benchmarks/tree.py, placement) that leaves 30 % fewer runs per sequence, at a hit rate at
# most 0.003 lower than when exactly what is missing is evicted. Pools under 16 chunks evict exactly.
EVICTION_SHARE = 16

CopyTokens = Callable[[int, int, int], None]  # (source slot, target slot, number of tokens)


@dataclass(slots=True)
class Counters:
    """What happened since the store was made."""

    acquires: int = 0
    hit_tokens: int = 0
    miss_tokens: int = 0
    evicted_chunks: int = 0
    copied_tokens: int = 0
    deduplicated_chunks: int = 0


class Watcher(Protocol):
    """Who is told what happens to cached chunks: that is how they get to other tiers. Called on the store's thread."""

    def published(self, node: Node) -> None:
        """A chunk has joined the tree."""

    def used(self, node: Node) -> None:
        """The path down to `node` was found by an acquire."""

    def released(self, node: Node) -> None:
        """A lease on the path down to `node` has ended."""

    def evicted(self, nodes: Sequence[Node]) -> None:
        """Chunks have left the tree to make room, children before parents. Their slots hold them until this returns."""


class Ledger:
    """The slots of one pool, the tree over the cached ones, and the claims on those to come."""

    def __init__(
        self,
        n_chunks: int,
        chunk_tokens: int,
        copy_tokens: CopyTokens,
        policy: EvictionPolicy | None,
        watcher: Watcher | None = None,
    ) -> None:
        self.slots = SlotAllocator(n_chunks)
        self.tree = PrefixTree(chunk_tokens, policy)
        self.claims = Claims(self.tree)
        self.private: set[int] = set()
        self.counters = Counters()
        self.accounts = Accounts()
        self.evicted = EvictedChunks()
        self.watcher = watcher
        self._copy_tokens = copy_tokens

    def take(self, n: int, after: int | None) -> list[int]:
        """Return `n` private slots, evicting cached chunks if there are too few free ones.

        Raises:
            CapacityError: free and evictable slots together are too few; then nothing was evicted either.
        """
        missing = n - self.slots.n_free
        if missing > 0:
            if not self.tree.can_evict(missing):
                evictable = len(self.tree) - self.tree.n_sheltered()
                raise CapacityError(
                    f"{n} chunks needed, {self.slots.n_free} free and {evictable} evictable of {self.slots.n_slots}"
                )
            evicted = self.tree.evict(max(missing, self.slots.n_slots // EVICTION_SHARE))
            if self.watcher is not None:
                self.watcher.evicted(evicted)
            self._free_evicted(evicted)
        slots = self.slots.allocate(n, after)
        self.private.update(slots)
        return slots

    def evict(self, n: int) -> int:
        """Free up to `n` cached chunks and return how many it were. Nobody is told: they are not wanted any more."""
        return self._free_evicted(self.tree.evict(n))

    def evict_namespace(self, namespace: Namespace) -> list[int]:
        """Free every cached chunk of a namespace that no lease holds and return their slots."""
        nodes = self.tree.evict_namespace(namespace)
        self._free_evicted(nodes)
        return [node.slot for node in nodes]

    def evict_below(self, tops: Iterable[Node]) -> list[int]:
        """Free `tops` and every cached chunk below them that no lease holds, and return their slots."""
        nodes = self.tree.evict_below(tops)
        self._free_evicted(nodes)
        return [node.slot for node in nodes]

    def count(self, namespace: bytes, lookup: Lookup, times: int = 1) -> None:
        """Count what a prompt found in a namespace, by its digest; with `times` -1 it was not used after all."""
        self.counters.acquires += times
        self.counters.hit_tokens += times * lookup.hits
        self.counters.miss_tokens += times * lookup.misses
        self.accounts.of(namespace).count(lookup, times)

    def count_evicted(self, node: Node, prompt: bytes) -> int:
        """Return how many chunks of `prompt`, counted from those that follow `node` on, were cached and evicted.

        `node` is the deepest one that the prompt finds.
        """
        begin = node.depth * self.tree.chunk_tokens * TOKEN_BYTES
        whole = len(prompt) - len(prompt) % (self.tree.chunk_tokens * TOKEN_BYTES)
        return self.evicted.count_run(node.digest, self.tree.keys_of(prompt, begin, whole))

    def drop(self, slots: Iterable[int]) -> None:
        """Free private slots."""
        slots = list(slots)
        self.private.difference_update(slots)
        self.slots.free(slots)

    def publish(self, parent: Node, key: bytes, slot: int, expected: float = 0.0) -> Node:
        """Make a private slot the cached chunk `key` below `parent`; return its node, pinned once for the caller.

        If that chunk is cached already, the private slot is freed and the older one, which others may use, is returned.
        """
        known = parent.children.get(key)
        if known is not None:
            self.tree.pin(known)
            self.drop([slot])
            self.counters.deduplicated_chunks += 1
            return known
        self.private.remove(slot)
        node = self.tree.insert(parent, key, slot, expected)
        self.claims.published(node)
        if self.watcher is not None:
            self.watcher.published(node)
        return node

    def copy(self, source_slot: int, n_tokens: int, after: int | None) -> int:
        """Return a private slot that holds a copy of the first `n_tokens` tokens of `source_slot`.

        The caller keeps the source from being evicted. Raises CapacityError as `take` does.
        """
        (slot,) = self.take(1, after)
        try:
            self._copy_tokens(source_slot, slot, n_tokens)
        except BaseException:
            self.drop([slot])
            raise
        self.counters.copied_tokens += n_tokens
        return slot

    def _free_evicted(self, nodes: Sequence[Node]) -> int:
        self.slots.free(node.slot for node in nodes)
        self.counters.evicted_chunks += len(nodes)
        for node in nodes:
            self.evicted.remember(node.digest)
            self.accounts.of(node.root.key).evicted_chunks += 1
        return len(nodes)

    def check(self) -> None:
        """Raise InvariantError unless free, cached and private slots partition the pool, and the parts are sound."""
        self.slots.check()
        self.tree.check()
        self.claims.check()
        cached = {node.slot for node in self.tree.nodes() if node.parent is not None}
        for slot in range(self.slots.n_slots):
            owners = [self.slots.is_free(slot), slot in cached, slot in self.private]
            if sum(owners) != 1:
                raise InvariantError(f"ledger: slot {slot} must be one of free, cached, private and is {owners}")
