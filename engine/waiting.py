"""The waiting queue: whose turn it is.

Invariant: of the tenants that wait, the one that was served the fewest tokens is next; within a tenant the smallest
`priority` is, and among equals the first to arrive. Whoever waits is overtaken by another tenant only until that one
was served as much, so nobody starves whatever the others send. (Within a tenant the last in priority can.)

With `cached_share`, those of equal priority whose prompts are cached for the most part go before the first to arrive,
which may each be overtaken `WINDOW` times (`turns.cache_first`). Tenants' turns stay as they are.

This is the virtual token counter of "Fairness in Serving Large Language Models" (arXiv 2401.00588). Deficit round robin
would need a quantum, which is either less than a prompt or unfair by one.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from itertools import takewhile

from stemcache.engine.sequence import Sequence
from stemcache.engine.turns import cache_first


class WaitingQueue:
    """Sequences that hold no slots. `charge` is to be called for every token computed, whoever it was computed for.

    cached_share: tokens of a sequence that are cached now over those to compute; None to serve by arrival.
    """

    def __init__(self, cached_share: Callable[[Sequence], float] | None = None) -> None:
        self._cached_share = cached_share
        self._queues: dict[bytes, list[Sequence]] = {}  # no tenant has an empty one
        self._served: dict[bytes, int] = {}
        self._floor = 0  # what the tenant that was last in turn had been served

    def __len__(self) -> int:
        """Safe to call from any thread."""
        return sum(map(len, list(self._queues.values())))

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._queues.get(sequence.request.tenant, ())

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait.

        A tenant that did not wait begins where the others are: time in which it asked for nothing is no credit.
        """
        tenant = sequence.request.tenant
        if tenant not in self._queues:
            self._forget_idle()
            self._queues[tenant] = []
            self._served[tenant] = max(self._served.get(tenant, 0), self._floor)
        bisect.insort(self._queues[tenant], sequence, key=_turn)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out. Raises ValueError if it is not there."""
        tenant = sequence.request.tenant
        queue = self._queues.get(tenant, [])
        queue.remove(sequence)
        if not queue:
            del self._queues[tenant]

    def start(self, sequence: Sequence) -> None:
        """Take out the sequence whose turn it is."""
        self._floor = max(self._floor, self._served[sequence.request.tenant])
        for earlier in takewhile(lambda each: each is not sequence, self._queues[sequence.request.tenant]):
            earlier.overtaken += 1
        self.remove(sequence)

    def charge(self, tenant: bytes, n_tokens: int) -> None:
        """Count tokens that were computed for a tenant. What the cache saved costs nothing."""
        self._served[tenant] = self._served.get(tenant, self._floor) + n_tokens

    def forget(self) -> None:
        """Let all tenants start anew. For an engine with nothing to do, which owes nobody anything."""
        self._served, self._floor = dict.fromkeys(self._queues, 0), 0

    def in_turn(self) -> Iterator[Sequence]:
        """Each waiting sequence once. A charge between two of them changes who is next."""
        left = {tenant: queue[::-1] for tenant, queue in self._queues.items()}
        unarranged = set(left)
        while left:
            tenant = min(left, key=lambda each: (self._served[each], left[each][-1].order))
            if tenant in unarranged:  # not before its turn, for it means looking up prompts
                unarranged.remove(tenant)
                left[tenant] = self._arranged(self._queues[tenant])[::-1]
            yield left[tenant].pop()
            if not left[tenant]:
                del left[tenant]

    def _arranged(self, queue: list[Sequence]) -> list[Sequence]:
        """A tenant's queue in the order of turns."""
        if self._cached_share is None:
            return queue[:]
        first = queue[0].request.priority
        n_first = bisect.bisect_right(queue, first, key=lambda each: each.request.priority)
        return cache_first(queue[:n_first], self._cached_share, lambda each: each.overtaken) + queue[n_first:]

    def _forget_idle(self) -> None:
        """Drop the counters that `add` would not look at, so that tenants who are gone take no memory."""
        self._served = {
            tenant: served for tenant, served in self._served.items() if tenant in self._queues or served > self._floor
        }


def _turn(sequence: Sequence) -> tuple[int, int, int]:
    return (sequence.request.priority, *sequence.order)
