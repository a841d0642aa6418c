"""The scheduler: which tokens of which sequences the next step computes. Knows leases and queues, nothing of tensors.

Invariant: a running sequence holds a lease with slots for all tokens that it is scheduled for; a waiting one holds
none. The oldest sequence always makes progress: when slots run out, the youngest is preempted, its full chunks
staying cached.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from stemcache.engine.sequence import Request, Sequence
from stemcache.engine.waiting import WaitingQueue
from stemcache.prefixtree.errors import CapacityError
from stemcache.prefixtree.store import PrefixStore


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Positions [start, stop) of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def completes(self) -> bool:
        """Whether the step yields the logits from which the sequence's next token is chosen."""
        return self.stop == len(self.sequence.tokens)


class Scheduler:
    """Continuous batching with chunked prefill over a prefix store.

    max_step_tokens: tokens of prompts that one step computes, or a quarter of it while others decode and would have
        to wait. Decoding sequences come first and are never held back by it.
    max_running: sequences that hold slots at once.
    """

    def __init__(self, store: PrefixStore, *, max_step_tokens: int, max_running: int) -> None:
        self._store = store
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prompt_tokens = 0  # of the requests that started, and how many of them were cached
        self.cached_tokens = 0

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        if self.is_idle:
            self.waiting.forget()
        self.waiting.add(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step. Empty only when there is nothing to do."""
        step: dict[Sequence, Scheduled] = {}
        decoding = [s for s in self.running if s.remaining == 1]
        prefilling = [s for s in self.running if s.remaining > 1]
        budget = max(1, self._max_step_tokens // 4) if decoding else self._max_step_tokens
        for sequence in decoding + prefilling:
            count = 1 if sequence.remaining == 1 else _piece(sequence, budget)
            if count == 0 or sequence.lease is None:  # no budget left, or preempted for one scheduled before
                continue
            if self._make_room(sequence, sequence.computed + count, step):
                step[sequence] = Scheduled(sequence, sequence.computed, sequence.computed + count)
                budget -= 0 if count == 1 else count
        for entry in step.values():
            self.waiting.charge(entry.sequence.request.tenant, entry.stop - entry.start)
        self._admit(step, budget)
        return list(step.values())

    def _make_room(self, sequence: Sequence, n_tokens: int, step: dict[Sequence, Scheduled]) -> bool:
        """Reserve slots, preempting younger sequences where needed; False when it had to preempt `sequence` itself."""
        assert sequence.lease is not None
        while True:
            try:
                sequence.lease.reserve(n_tokens)
            except CapacityError:
                youngest = max(self.running, key=lambda s: s.order)
                self.preempt(youngest)
                step.pop(youngest, None)
                if youngest is sequence:
                    return False
            else:
                return True

    def _admit(self, step: dict[Sequence, Scheduled], budget: int) -> None:
        """Start waiting sequences in turn, as far as budget and slots reach."""
        for sequence in self.waiting.in_turn():
            if budget <= 0 or len(self.running) >= self._max_running:
                return
            # The last token is always computed: its logits are what the request wants.
            prefix, namespace = sequence.tokens[:-1], sequence.request.namespace
            if self._store.awaited(prefix, namespace):
                continue
            if not self._start(sequence):
                return
            count = _piece(sequence, budget)
            step[sequence] = Scheduled(sequence, sequence.computed, sequence.computed + count)
            self.waiting.charge(sequence.request.tenant, count)
            budget -= count

    def _start(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a lease with slots for all its tokens; False when there are too few."""
        lease = self._store.acquire(sequence.tokens[:-1], sequence.request.namespace)
        try:
            lease.reserve(len(sequence.tokens))
        except CapacityError:
            lease.release()
            return False
        lease.claim(sequence.tokens)
        sequence.lease, sequence.computed = lease, lease.cached_tokens
        request = sequence.request
        if request.cached_tokens is None:
            request.cached_tokens = lease.cached_tokens
            request.stream.timing.start()
            self.prompt_tokens += len(request.prompt)
            self.cached_tokens += lease.cached_tokens
        self.waiting.start(sequence)
        bisect.insort(self.running, sequence, key=lambda s: s.order)
        return True

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Start `child`, another choice of `parent`'s request, on the parent's computed prompt.

        Where the pool has no slot for its last chunk the child waits its turn, and finds the full chunks cached.
        """
        assert parent.lease is not None
        try:
            child.lease = parent.lease.fork(parent.computed)
        except CapacityError:
            self.add(child)
        else:
            child.computed = parent.computed
            bisect.insort(self.running, child, key=lambda s: s.order)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's slots away; it waits in its old place."""
        self.running.remove(sequence)
        sequence.drop_lease()
        self.add(sequence)
        self.preemptions += 1

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence; its full chunks stay cached."""
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.drop_lease()

    def requests(self, match: Callable[[Request], bool] = lambda _: True) -> list[Request]:
        """The requests that run or wait, oldest first."""
        found = {s.request: None for s in (*self.running, *self.waiting) if match(s.request)}
        return sorted(found, key=lambda r: r.arrival)


def _piece(sequence: Sequence, budget: int) -> int:
    """Tokens of a sequence to compute with what is left of a step's budget.

    All that remain if they exceed the budget by a quarter at most: a small last piece would cost another whole pass
    over the weights, which on a CPU is as much as a hundred tokens.
    """
    if budget <= 0:
        return 0
    return sequence.remaining if sequence.remaining <= budget + budget // 4 else budget
