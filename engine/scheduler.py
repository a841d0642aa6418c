"""The scheduler: which tokens of which sequences the next step computes. Knows leases and queues, nothing of tensors.

Invariant: a running sequence holds a lease with slots for all tokens that it is scheduled for; a waiting one holds
none. The oldest sequence always makes progress: when slots run out, the youngest is preempted, its full chunks
staying cached.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from stemcache.engine.mover import Mover
from stemcache.engine.sequence import Request, Sequence
from stemcache.engine.waiting import WaitingQueue
from stemcache.prefixtree.errors import CapacityError
from stemcache.prefixtree.store import PrefixStore


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Positions of a sequence to be computed in this step, in runs; those in `logits`, the last ones, give logits."""

    sequence: Sequence
    runs: tuple[range, ...]
    logits: range

    @classmethod
    def of(cls, sequence: Sequence, count: int) -> Scheduled:
        """The next `count` tokens of a sequence."""
        runs = sequence.next_rows(count)
        return cls(sequence, runs, range(max(runs[0].start, sequence.first_logits), runs[-1].stop))

    @property
    def start(self) -> int:
        return self.runs[0].start

    @property
    def stop(self) -> int:
        return self.runs[-1].stop

    @property
    def n_rows(self) -> int:
        return sum(map(len, self.runs))

    @property
    def completes(self) -> bool:
        """Whether the step yields the logits from which the sequence's next token is chosen."""
        return self.stop == len(self.sequence.tokens)


class Scheduler:
    """Continuous batching with chunked prefill over a prefix store.

    max_step_tokens: tokens of prompts that one step computes. While others decode and would have to wait for it, the
        part of it that goes with the part of all sequences that wait for their first token, but a quarter at least.
        Decoding sequences come first and are never held back by it.
    max_running: sequences that hold slots at once.
    max_logit_rows: rows of logits in one step, beside the last one of each sequence. Only prompts whose own tokens'
        log-probabilities are asked for have such rows; what does not fit comes in the next step.
    cache_first: within a tenant, start those first whose prompts are cached for the most part.
    give_way: asked for slots before a sequence is preempted; True if some were given back.
    mover: what moves passages to where they stand in a sequence that may be blended.
    """

    def __init__(
        self,
        store: PrefixStore,
        *,
        max_step_tokens: int,
        max_running: int,
        max_logit_rows: int = 1 << 16,
        cache_first: bool = False,
        give_way: Callable[[], bool] = lambda: False,
        mover: Mover | None = None,
    ) -> None:
        self._store = store
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running
        self._max_logit_rows = max_logit_rows
        self._give_way = give_way
        self._mover = mover
        self.waiting = WaitingQueue(self._cached_share if cache_first else None)
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prompt_tokens = 0  # of the requests that started, and how many of them were cached
        self.cached_tokens = 0
        self.moved_tokens = 0

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        if self.is_idle:
            self.waiting.forget()
        self.waiting.add(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step. Empty only when there is nothing to do, or all that waits waits for chunks from a tier."""
        step: dict[Sequence, Scheduled] = {}
        decoding = [s for s in self.running if s.remaining == 1]
        prefilling = [s for s in self.running if s.remaining > 1]
        budget = _Budget(self._step_tokens(len(decoding), len(prefilling)), self._max_logit_rows)
        for sequence in decoding + prefilling:
            count = 1 if sequence.remaining == 1 else budget.piece(sequence)
            if count == 0 or sequence.lease is None:  # no budget left, or preempted for one scheduled before
                continue
            entry = Scheduled.of(sequence, count)
            if self._make_room(sequence, entry.stop, step):
                step[sequence] = entry
                if count > 1:
                    budget.spend(step[sequence])
        for entry in step.values():
            self.waiting.charge(entry.sequence.request.tenant, entry.n_rows)
        self._admit(step, budget)
        return list(step.values())

    def _step_tokens(self, decoding: int, prefilling: int) -> int:
        """How many tokens of prompts a step may compute.

        Rejected: a quarter whenever somebody decodes, with which a burst of prompts read its second half in small
        steps, at half as much again a token, for the sake of the first of them that was through.
        """
        if not decoding:
            return self._max_step_tokens
        wait = prefilling + len(self.waiting)
        return max(1, self._max_step_tokens // 4, self._max_step_tokens * wait // (wait + decoding))

    def _make_room(self, sequence: Sequence, n_tokens: int, step: dict[Sequence, Scheduled]) -> bool:
        """Reserve slots, preempting younger sequences where needed; False when it had to preempt `sequence` itself."""
        assert sequence.lease is not None
        while True:
            try:
                sequence.lease.reserve(n_tokens)
            except CapacityError:
                if self._give_way():
                    continue
                youngest = max(self.running, key=lambda s: s.order)
                self.preempt(youngest)
                step.pop(youngest, None)
                if youngest is sequence:
                    return False
            else:
                return True

    def _admit(self, step: dict[Sequence, Scheduled], budget: _Budget) -> None:
        """Start waiting sequences in turn, as far as budget and slots reach."""
        if budget.tokens <= 0 or len(self.running) >= self._max_running:
            return  # before anybody looks up prompts to find whose turn it is
        for sequence in self.waiting.in_turn():
            if budget.tokens <= 0 or len(self.running) >= self._max_running:
                return
            # The last token at least is always computed: its logits are what the request wants.
            prefix, namespace = sequence.tokens[: sequence.first_logits], sequence.request.namespace
            if self._store.awaited(prefix, namespace):
                continue
            if not self._start(sequence):
                return
            step[sequence] = entry = Scheduled.of(sequence, budget.piece(sequence))
            self.waiting.charge(sequence.request.tenant, entry.n_rows)
            budget.spend(entry)

    def _start(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a lease with slots for all its tokens; False when there are too few."""
        request = sequence.request
        mover = None if request.blend is None else self._mover
        if mover is not None:
            mover.touch(request)  # so that making room for the sequence evicts others first
        lease = self._store.acquire(sequence.tokens[: sequence.first_logits], request.namespace)
        lease.expected = request.expected
        try:
            lease.reserve(len(sequence.tokens))
        except CapacityError:
            lease.release(used=False)
            return False
        if mover is not None:
            sequence.moved = mover.move(request, lease)
        lease.claim(sequence.tokens)
        sequence.lease, sequence.computed = lease, lease.cached_tokens
        if request.cached_tokens is None:
            request.cached_tokens, request.evicted_tokens = lease.cached_tokens, lease.evicted_tokens
            request.moved = sequence.moved
            request.stream.timing.start()
            self.prompt_tokens += len(request.prompt)
            self.cached_tokens += lease.cached_tokens
            self.moved_tokens += sum(len(each.kept) for each in sequence.moved)
        bisect.insort(self.running, sequence, key=lambda s: s.order)
        self.waiting.start(sequence)  # last: whoever counts beside this thread misses nobody
        return True

    def _cached_share(self, sequence: Sequence) -> float:
        cached = self._store.match_tokens(sequence.tokens[: sequence.first_logits], sequence.request.namespace)
        return cached / (len(sequence.tokens) - cached)

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


@dataclass(slots=True)
class _Budget:
    """What one step may still take: tokens of prompts, and rows of logits beside each sequence's last."""

    tokens: int
    logit_rows: int

    def piece(self, sequence: Sequence) -> int:
        """Tokens of a sequence to compute with what is left.

        All that remain if they exceed the tokens by a quarter at most: a small last piece would cost another whole pass
        over the weights, which on a CPU is as much as a hundred tokens.
        """
        if self.tokens <= 0:
            return 0
        count = sequence.remaining if sequence.remaining <= self.tokens + self.tokens // 4 else self.tokens
        count = min(count, sequence.request.step_tokens or count)
        silent = max(0, sequence.first_logits - sequence.computed)  # tokens before the first that gives logits
        return min(count, silent + 1 + self.logit_rows)

    def spend(self, entry: Scheduled) -> None:
        """Take what an entry needs."""
        self.tokens -= entry.n_rows
        self.logit_rows -= max(0, len(entry.logits) - 1)
