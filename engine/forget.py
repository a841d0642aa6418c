"""Forgetting: nothing that was computed from some tokens stays, wherever it lies and whoever uses it.

Invariant: when `forget` returns, no chunk that another request could find was computed from the forgotten tokens, and
none will be. A request that was computing with them starts over in a namespace of its own, which is emptied when the
request ends. So its answer is the same, and it publishes nothing. Slots are overwritten, not only freed.

Rejected: letting running requests finish on chunks that are only marked. Until they end others could find the chunks,
or the tree would need chunks that cannot be found; and a popular document is never unused.

Touched by the engine's thread only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from stemcache.engine.pins import Pins
from stemcache.engine.scheduler import Scheduler
from stemcache.engine.sequence import Request
from stemcache.prefixtree.footprint import Footprint, Footprints
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.pool import KVPool
from stemcache.prefixtree.store import PrefixStore


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What `forget` did: chunks removed, requests that began anew, pins that ended."""

    chunks: int = 0
    restarted_requests: int = 0
    ended_pins: int = 0


class Forgetting:
    """Removes what footprints mark from a store, and from the requests and pins that use it."""

    def __init__(self, store: PrefixStore, pool: KVPool, scheduler: Scheduler, pins: Pins) -> None:
        self._store = store
        self._pool = pool
        self._scheduler = scheduler
        self._pins = pins
        self._isolated: dict[Request, None] = {}

    def forget(self, footprints: Iterable[Footprint]) -> Forgotten:
        """Remove every chunk at and below those that the footprints mark. O(chunks of their namespaces)."""
        wanted = list(footprints)
        sought = Footprints(wanted, self._store.chunk_tokens)
        requests = self._scheduler.requests(
            lambda request: any(sought.in_prompt(s.tokens, request.namespace) for s in request.sequences)
        )
        for request in requests:
            self._isolate(request)
        tops = [node for _, node in self._store.marked(wanted)]
        pins = self._pins.end_below(tops)
        slots = self._store.evict_below(tops)
        self._pool.wipe(slots)
        return Forgotten(len(slots), len(requests), pins)

    def held(self, footprints: Iterable[Footprint]) -> set[Footprint]:
        """Those of the footprints that mark something, cached or being computed."""
        wanted = list(footprints)
        sought = Footprints(wanted, self._store.chunk_tokens)
        found = {footprint for footprint, _ in self._store.marked(wanted)}
        for request in self._scheduler.requests():
            for sequence in request.sequences:
                found.update(sought.in_prompt(sequence.tokens, request.namespace))
        return found

    def is_isolated(self, namespace: Namespace) -> bool:
        """Whether a namespace is that of a request that began anew. Its chunks must not be copied anywhere."""
        return any(request.namespace == namespace for request in self._isolated)

    def sweep(self) -> None:
        """Empty the namespaces of the requests that have ended. Cheap enough for every step."""
        if self._isolated:
            alive = set(self._scheduler.requests())
            for request in [each for each in self._isolated if each not in alive]:
                del self._isolated[request]
                self._pool.wipe(self._store.evict_namespace(request.namespace))

    def _isolate(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.lease is not None:
                self._pool.wipe(sequence.lease.private_slots)
                self._scheduler.preempt(sequence)
        request.namespace = Namespace(os.urandom(32))
        self._isolated[request] = None
