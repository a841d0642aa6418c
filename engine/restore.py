"""Restoring: chunks on their way back from the tiers to the device, while other requests compute.

Invariants: the engine's thread never waits for a tier. A request waits for its chunks until its budget is spent and not
longer; what has not arrived by then is computed. Slots are written by the threads that load (see `ChunkLoader`), and
by none once the restoration has ended.

A restoration holds a lease with a claim, like a request that computes: so whoever needs the same chunks waits for them,
nothing is loaded twice, and what has arrived is shared as soon as it is committed.

    begin -> lookup (thread) -> worth it? -> loads (threads) -> committed in order -> finish
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Final

from stemcache.engine.chunk_loader import ChunkLoader
from stemcache.engine.load_cost import LoadCost
from stemcache.engine.restoration import Found, LoadBudget, Restoration, RestoreCounters
from stemcache.engine.sequence import Sequence
from stemcache.prefixtree.codecs.codec import Codec
from stemcache.prefixtree.errors import CapacityError
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import path_digests
from stemcache.prefixtree.pool import KVPool
from stemcache.prefixtree.runs import runs_after
from stemcache.prefixtree.store import Lease, PrefixStore
from stemcache.prefixtree.tiers.tier import Tier, tier_key
from stemcache.prefixtree.tokens import TOKEN_BYTES, encode_tokens

log = logging.getLogger(__name__)

CONNECTIONS: Final = 4
MAX_AT_ONCE: Final = 4
LOOK_AHEAD: Final = 16
"""Waiting requests that are looked at before their turn."""


class Restorer:
    """Looks into `tiers`, fastest first, for what waiting requests need. Belongs to the engine's thread.

    post: hands a function to the engine's thread; may be called from any.
    """

    def __init__(
        self,
        store: PrefixStore,
        pool: KVPool,
        tiers: list[Tier],
        group: int,
        codec: Codec,
        secret: bytes | None,
        *,
        post: Callable[[Callable[[], None]], None],
        restoring: Callable[[bool], None],
        cost: LoadCost,
        budget: LoadBudget,
    ) -> None:
        self._store, self._tiers, self._group = store, tiers, group
        self._loader = ChunkLoader(pool, codec, secret)
        self._post, self._restoring = post, restoring
        self._cost, self._budget = cost, budget
        self.counters = RestoreCounters()
        self._active: list[Restoration] = []
        self._blocked: Counter[bytes] = Counter()
        self._executor = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="stemcache-restore") if tiers else None

    # -- the engine's thread -----------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return bool(self._active)

    @property
    def seconds_left(self) -> float | None:
        """Until the next budget is spent; None if nothing is awaited."""
        if not self._active:
            return None
        return max(0.0, min(each.deadline for each in self._active) - time.monotonic())

    def look_ahead(self, waiting: Iterator[Sequence]) -> None:
        """Begin to look for what the next waiting sequences need, each of them once."""
        if self._executor is None:
            return
        for sequence in islice(waiting, LOOK_AHEAD):
            if len(self._active) >= MAX_AT_ONCE:
                return
            if not sequence.looked_below:
                self._begin(sequence)

    def expire(self) -> None:
        """End the restorations whose budget is spent."""
        if self._active:
            now = time.monotonic()
            for each in [each for each in self._active if each.deadline <= now]:
                self._end(each, "deadline")

    def give_way(self) -> bool:
        """End the youngest restoration, for its slots; False if there is none."""
        if not self._active:
            return False
        self._end(self._active[-1], "no_room")
        return True

    def block(self, namespace: Namespace) -> None:
        """Load nothing of a namespace until `unblock`. Blocks are counted."""
        self._blocked[namespace.digest] += 1
        for each in [each for each in self._active if each.namespace == namespace]:
            self._end(each, "forgotten")

    def unblock(self, namespace: Namespace) -> None:
        self._blocked[namespace.digest] -= 1
        if not self._blocked[namespace.digest]:
            del self._blocked[namespace.digest]

    def close(self) -> None:
        """End all restorations. Does not wait for the threads, which are back by their deadlines."""
        for each in list(self._active):
            self._end(each, "closed")
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    # -- the way of a restoration ------------------------------------------------------------------------------------

    def _begin(self, sequence: Sequence) -> None:
        assert self._executor is not None
        namespace, size = sequence.request.namespace, self._store.chunk_tokens
        tokens = sequence.tokens[: sequence.first_logits // size * size]
        if namespace.digest in self._blocked:
            return
        if self._store.awaited(tokens, namespace):  # what another computes or loads now may be all that is needed
            return
        lease = self._store.pin(tokens, namespace)
        missing = len(tokens) - lease.committed_tokens
        has_room = self._store.has_room(-(-len(sequence.tokens) // size) - lease.node.depth)
        sequence.looked_below = not missing or has_room  # without room it cannot start either, and is looked at again
        if not missing or not has_room:
            lease.release()
            return
        compute = self._cost.compute_seconds(lease.committed_tokens, missing)
        load = min(self._cost.load_seconds(tier.name, missing) for tier in self._tiers)
        now = time.monotonic()
        above = lease.node.digest if lease.node.depth else namespace.digest
        lease.claim(tokens)
        restoration = Restoration(
            sequence=sequence,
            namespace=namespace,
            tokens=tokens,
            lease=lease,
            begun=now,
            deadline=now + self._budget.seconds(load, compute),
            digests=list(path_digests(above, encode_tokens(tokens[lease.node.depth * size :]), size * TOKEN_BYTES)),
            depth=lease.node.depth,
        )
        self._active.append(restoration)
        self._executor.submit(self._lookup, restoration)

    def _found(self, restoration: Restoration, objects: list[Found]) -> None:
        """The lookup is done: load what is worth it."""
        assert self._executor is not None
        if restoration.ended:
            return
        if not objects:
            self._end(restoration, "absent")
            return
        last = objects[-1].run.last
        size = self._store.chunk_tokens
        n_tokens = (last - restoration.depth) * size
        slowest = max((each.tier.name for each in objects), key=lambda name: self._cost.load_seconds(name, n_tokens))
        if not self._cost.advises(slowest, restoration.depth * size, n_tokens):
            self._end(restoration, "cheaper_to_compute")
            return
        try:
            restoration.lease.reserve(last * size)
        except CapacityError:
            self._end(restoration, "no_room")
            return
        restoration.objects = objects
        restoration.slots = list(restoration.lease.slots)
        restoration.loading_since = time.monotonic()
        for index, found in enumerate(objects):
            self._executor.submit(self._load, restoration, index, found)

    def _arrived(self, restoration: Restoration, index: int, is_here: bool, at: float) -> None:
        """An object is in its slots since `at`, or is not to be had: then nothing after it is of use."""
        if restoration.ended:
            return
        if not is_here:
            del restoration.objects[index:]
        elif index < len(restoration.objects):
            restoration.arrived.add(index)
            restoration.last_arrival = max(restoration.last_arrival, at)
        lease = restoration.lease
        while restoration.committed in restoration.arrived:
            found = restoration.objects[restoration.committed]
            before = lease.node.depth
            self._commit(lease, restoration.tokens[: found.run.last * self._store.chunk_tokens])
            self.counters.tokens[found.tier.name] += (lease.node.depth - before) * self._store.chunk_tokens
            restoration.committed += 1
        if restoration.committed >= len(restoration.objects):
            self._end(restoration, "loaded" if is_here else "incomplete")

    def _commit(self, lease: Lease, tokens: list[int]) -> None:
        self._restoring(True)
        try:
            lease.commit(tokens)
        finally:
            self._restoring(False)

    def _end(self, restoration: Restoration, how: str) -> None:
        with restoration.writing.alone():
            restoration.ended = True
        if how == "no_room":  # nor can the sequence start before there is: then it is looked for again
            restoration.sequence.looked_below = False
        self._active.remove(restoration)
        self._learn(restoration, how)
        restoration.lease.release()
        now = time.monotonic()
        self.counters.ended[how] += 1
        self.counters.waited += now - restoration.begun
        self.counters.longest_wait = max(self.counters.longest_wait, now - restoration.begun)
        self.counters.overrun = max(self.counters.overrun, now - restoration.deadline)

    def _learn(self, restoration: Restoration, how: str) -> None:
        """Note what loading took. What never came is taken to have needed twice as long."""
        if restoration.loading_since is None or how not in ("loaded", "deadline"):
            return
        if how == "loaded":
            seconds = restoration.last_arrival - restoration.loading_since
        else:
            seconds = 2 * (time.monotonic() - restoration.loading_since)
        objects = restoration.objects
        n_tokens = (objects[-1].run.last - restoration.depth) * self._store.chunk_tokens
        for name in {each.tier.name for each in objects}:
            self._cost.loaded(name, n_tokens, seconds)

    # -- the threads -------------------------------------------------------------------------------------------------

    def _lookup(self, restoration: Restoration) -> None:
        """Find each chunk's object in the fastest tier that has it."""
        objects: list[Found] = []
        try:
            keys = [tier_key(restoration.namespace.digest, digest) for digest in restoration.digests]
            where: list[Tier | None] = [None] * len(keys)
            for tier in self._tiers:
                for i, there in enumerate(tier.lookup(keys, restoration.deadline)):
                    where[i] = where[i] or (tier if there else None)
            for run in runs_after(restoration.depth, [tier is not None for tier in where], self._group):
                at = run.last - restoration.depth - 1
                found = where[at]
                assert found is not None
                objects.append(Found(run, keys[at], restoration.digests[at], found))
        except Exception:
            log.exception("a lookup in the tiers failed")
            objects = []
        self._post(lambda: self._found(restoration, objects))

    def _load(self, restoration: Restoration, index: int, found: Found) -> None:
        is_here = False
        try:
            if not restoration.ended and index < len(restoration.objects):
                is_here = self._loader.load(restoration, found)
        except Exception:
            log.exception("a load from a tier failed")
        at = time.monotonic()
        self._post(lambda: self._arrived(restoration, index, is_here, at))
