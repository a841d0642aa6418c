"""The store against a model made of plain dictionaries, under random histories (Hypothesis, stateful).

It also remembers every chunk that was ever cached, which is what explanations are judged by.

The memory is simulated: a slot holds, per token, the identity of what was computed there, (namespace, exact prefix).
So the promise "a lease's slots hold exactly this prefix's keys and values" is one comparison, made for every position
of every live lease after every operation. The model predicts the rest exactly: what is cached, what is evicted and in
which order, who claims which chunk, and whether there is room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stemcache.prefixtree.errors import CapacityError
from stemcache.prefixtree.explain import Divergence, Reason
from stemcache.prefixtree.lease import Lease
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.store import PrefixStore

NAMESPACES = [Namespace.of(model="m", dtype="float32", tenant=tenant) for tenant in ("a", "b")]

Tokens = tuple[int, ...]
Prefix = tuple[int, Tokens]  # (index of the namespace, tokens)

# Prompts are cut from four texts that agree for 0, 3 or 8 tokens, so that histories meet; a free tail lets them part.
TEXTS: list[Tokens] = [(0,) * 20, (0, 0, 0, 1) * 5, (0, 0, 0, 1, 0, 0, 0, 1) + (1, 0) * 6, (1, 0, 1, 1, 0) * 4]
texts = st.sampled_from(TEXTS)
lengths = st.integers(1, 17)
tails = st.lists(st.integers(0, 1), max_size=3).map(tuple)
spaces = st.integers(0, len(NAMESPACES) - 1)
picks = st.integers(0, 1_000)


def shared(left: Tokens, right: Tokens) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@dataclass(eq=False)
class Sequence:
    """A running request: the real lease, and what the model believes of it."""

    lease: Lease
    space: int
    tokens: Tokens  # committed
    published: int  # leading chunks of it that are in the tree
    n_slots: int
    prompt: Tokens | None = None  # set once it claims
    claim: Prefix | None = None


@dataclass
class Model:
    """The store in plain dictionaries: every cached chunk under its exact prefix, with the time of its last use."""

    total: int
    chunk: int
    cached: dict[Prefix, int] = field(default_factory=dict)
    ever: set[Prefix] = field(default_factory=set)
    tokens: Counter[tuple[int, str]] = field(default_factory=Counter)  # acquired ones, by namespace and account field
    sequences: list[Sequence] = field(default_factory=list)
    now: int = 0

    def path(self, prefix: Prefix) -> list[Prefix]:
        space, tokens = prefix
        return [(space, tokens[:end]) for end in range(self.chunk, len(tokens) + 1, self.chunk)]

    def node(self, sequence: Sequence) -> Prefix:
        return sequence.space, sequence.tokens[: sequence.published * self.chunk]

    def touch(self, prefix: Prefix) -> None:
        self.now += 1
        self.cached.update(dict.fromkeys(self.path(prefix), self.now))

    def pinned(self, *extra: Prefix) -> set[Prefix]:
        holds = [self.node(s) for s in self.sequences] + list(extra)
        holds += [(s.claim[0], s.claim[1][: -self.chunk]) for s in self.sequences if s.claim]
        return {prefix for hold in holds for prefix in self.path(hold)}

    def free(self) -> int:
        return self.total - len(self.cached) - sum(s.n_slots - s.published for s in self.sequences)

    def has_room(self, n: int, *extra: Prefix) -> bool:
        return n <= self.free() + len(self.cached.keys() - self.pinned(*extra))

    def make_room(self, n: int, *extra: Prefix) -> None:
        """Evict least recently used leaves, a sixteenth of the pool at least, by walking everything every time."""
        missing = n - self.free()
        evictable = len(self.cached.keys() - self.pinned(*extra))
        for _ in range(min(max(missing, self.total // 16), evictable) if missing > 0 else 0):
            inner = {(space, tokens[: -self.chunk]) for space, tokens in self.cached}
            leaves = self.cached.keys() - inner - self.pinned(*extra)
            del self.cached[min(leaves, key=lambda prefix: self.cached[prefix])]

    def full(self, space: int, tokens: Tokens) -> Tokens:
        """The longest run of whole cached chunks."""
        path = self.path((space, tokens))
        return max(
            (p[1] for i, p in enumerate(path) if all(q in self.cached for q in path[: i + 1])), key=len, default=()
        )

    def closest(self, space: int, tokens: Tokens) -> tuple[Prefix, int] | None:
        """The cached chunk after the full ones that shares most tokens; of equals, the one just before in order."""
        full = self.full(space, tokens)
        rest = tokens[len(full) : len(full) + self.chunk]
        keys = [p[1][len(full) :] for p in self.cached if p[0] == space and p[1][: -self.chunk] == full]
        most = max((shared(key, rest) for key in keys), default=0)
        if not most:
            return None
        best = sorted(key for key in keys if shared(key, rest) == most)
        before = [key for key in best if key < rest]
        return (space, full + (before[-1] if before else best[0])), most

    def claimed(self, space: int, tokens: Tokens) -> bool:
        full = self.full(space, tokens)
        following = tokens[: len(full) + self.chunk]
        return len(following) == len(full) + self.chunk and any(s.claim == (space, following) for s in self.sequences)

    def was_evicted(self, space: int, tokens: Tokens, position: int) -> bool:
        """Whether the whole chunk around `position` was cached once and is not now."""
        end = position - position % self.chunk + self.chunk
        prefix = (space, tokens[:end])
        return end <= len(tokens) and prefix in self.ever and prefix not in self.cached

    def is_unfinished(self, tokens: Tokens, position: int) -> bool:
        return position >= len(tokens) - len(tokens) % self.chunk

    def count(self, space: int, tokens: Tokens, n_hits: int) -> None:
        for position in range(len(tokens)):
            if position < n_hits:
                kind = "hit_tokens"
            elif self.was_evicted(space, tokens, position):
                kind = "evicted_tokens"
            else:
                kind = "unfinished_tokens" if self.is_unfinished(tokens, position) else "new_tokens"
            self.tokens[space, kind] += 1

    def reason(self, space: int, tokens: Tokens, n_last: int, position: int) -> Reason:
        """Why one token is a hit or a miss, by looking at everything."""
        reusable = tokens[: len(tokens) - n_last]
        full, closest = self.full(space, reusable), self.closest(space, reusable)
        n_hits = len(full) + (closest[1] if closest else 0)
        following = (space, reusable[: len(full) + self.chunk])
        pending = 0
        for sequence in self.sequences:
            if sequence.claim == following and sequence.prompt is not None:
                n_whole = len(sequence.prompt) - len(sequence.prompt) % self.chunk
                pending = min(shared(reusable, sequence.prompt), n_whole)
        chunks = {prefix[1][-self.chunk :] for prefix in self.cached if prefix[0] == space}
        begins = range(max(n_hits, position - self.chunk + 1), position + 1)
        if position >= len(reusable):
            return Reason.LAST_TOKEN
        if position < n_hits:
            return Reason.HIT if position < len(full) else Reason.PARTIAL_CHUNK
        if position < pending:
            return Reason.PENDING
        if self.was_evicted(space, tokens, position):
            return Reason.EVICTED
        if any(tokens[begin : begin + self.chunk] in chunks for begin in begins):
            return Reason.OTHER_POSITION
        return Reason.UNFINISHED_CHUNK if self.is_unfinished(tokens, position) else Reason.NEVER_SEEN

    def advance(self, sequence: Sequence) -> None:
        assert sequence.prompt is not None
        sequence.claim = None
        following = next((p for p in self.path((sequence.space, sequence.prompt)) if p not in self.cached), None)
        if following is not None and not any(s.claim == following for s in self.sequences):
            sequence.claim = following

    def commit(self, sequence: Sequence, tokens: Tokens) -> None:
        sequence.tokens = tokens
        before = sequence.published
        for end in range((before + 1) * self.chunk, len(tokens) + 1, self.chunk):
            prefix = (sequence.space, tokens[:end])
            sequence.published += 1
            if prefix not in self.cached:
                self.cached[prefix] = 0
                self.ever.add(prefix)
                self.touch(prefix)
                for claimant in [s for s in self.sequences if s.claim == prefix]:
                    self.advance(claimant)
        if sequence.published > before and sequence.prompt is not None and sequence.claim is None:
            self.advance(sequence)


class StoreMachine(RuleBasedStateMachine):
    @initialize(total=st.integers(1, 16), chunk=st.integers(1, 4))
    def start(self, total: int, chunk: int) -> None:
        self.memory: list[list[Prefix | None]] = [[None] * chunk for _ in range(total)]
        self.model = Model(total, chunk)
        self.store = PrefixStore(total, chunk, self.copy_tokens)

    def copy_tokens(self, source: int, target: int, n: int) -> None:
        assert source != target
        self.memory[target][:n] = self.memory[source][:n]

    # -- operations ----------------------------------------------------------------------------------------------------

    @rule(space=spaces, text=texts, length=lengths, tail=tails)
    def acquire(self, space: int, text: Tokens, length: int, tail: Tokens) -> None:
        model, tokens = self.model, text[:length] + tail
        full, closest = model.full(space, tokens), model.closest(space, tokens)
        expected = len(full) + (closest[1] if closest else 0)
        assert self.store.match_tokens(tokens, NAMESPACES[space]) == expected
        copied = closest is not None and model.has_room(1, closest[0])
        if closest is not None and copied:
            model.make_room(1, closest[0])
        if closest is not None:
            model.touch(closest[0])

        lease = self.store.acquire(tokens, NAMESPACES[space])
        assert lease.cached_tokens == (expected if copied else len(full))
        model.count(space, tokens, lease.cached_tokens)
        published = len(full) // model.chunk
        sequence = Sequence(lease, space, tokens[: lease.cached_tokens], published, published + copied)
        model.sequences.append(sequence)

    @rule(space=spaces, text=texts, length=lengths, tail=tails)
    def pin(self, space: int, text: Tokens, length: int, tail: Tokens) -> None:
        """A pin is a sequence that holds the cached whole chunks of a prompt."""
        full, before = self.model.full(space, text[:length] + tail), self.store.stats()
        lease = self.store.pin(text[:length] + tail, NAMESPACES[space])
        assert lease.cached_tokens == len(full)
        after = self.store.stats()
        assert (after.acquires, after.free_chunks, after.hit_tokens) == (
            before.acquires,
            before.free_chunks,
            before.hit_tokens,
        )
        n_chunks = len(full) // self.model.chunk
        self.model.sequences.append(Sequence(lease, space, full, n_chunks, n_chunks))

    @precondition(lambda self: self.model.sequences)
    @rule(pick=picks, n_tokens=st.integers(0, 30))
    def reserve(self, pick: int, n_tokens: int) -> None:
        self.try_reserve(self.sequence(pick), n_tokens)

    @precondition(lambda self: self.model.sequences)
    @rule(pick=picks, text=texts, n=st.integers(1, 9), tail=tails)
    def compute(self, pick: int, text: Tokens, n: int, tail: Tokens) -> None:
        """Extend a sequence, along its prompt if it claimed one: reserve, write the tokens' identities, commit."""
        sequence = self.sequence(pick)
        old = len(sequence.tokens)
        rest = sequence.prompt[old:] if sequence.prompt else ()
        new = sequence.tokens + (rest or text[old : old + n] + tail)[:n]
        if not self.try_reserve(sequence, len(new)):
            return
        for position in range(old, len(new)):
            index, offset = divmod(position, self.model.chunk)
            assert index >= sequence.published, "computing would overwrite a shared chunk"
            self.memory[sequence.lease.slots[index]][offset] = (sequence.space, new[: position + 1])
        self.model.commit(sequence, new)
        sequence.lease.commit(list(new))

    @precondition(lambda self: self.model.sequences)
    @rule(pick=picks, text=texts, length=lengths)
    def claim(self, pick: int, text: Tokens, length: int) -> None:
        sequence = self.sequence(pick)
        sequence.prompt = sequence.tokens + text[len(sequence.tokens) : length]
        sequence.claim = None
        self.model.advance(sequence)
        sequence.lease.claim(sequence.prompt)

    @precondition(lambda self: self.model.sequences)
    @rule(pick=picks, cut=picks)
    def fork(self, pick: int, cut: int) -> None:
        model, parent = self.model, self.sequence(pick)
        n_tokens = cut % (len(parent.tokens) + 1)
        published, rest = divmod(n_tokens, model.chunk)
        if rest and not model.has_room(1):
            before = self.snapshot()
            with pytest.raises(CapacityError):
                parent.lease.fork(n_tokens)
            assert self.snapshot() == before
            return
        if rest:
            model.make_room(1)
        lease = parent.lease.fork(n_tokens)
        assert lease.cached_tokens == n_tokens
        tokens = parent.tokens[:n_tokens]
        model.sequences.append(Sequence(lease, parent.space, tokens, published, published + bool(rest)))

    @precondition(lambda self: self.model.sequences)
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        sequence = self.sequence(pick)
        self.model.touch(self.model.node(sequence))
        self.model.sequences.remove(sequence)
        sequence.lease.release()
        sequence.lease.release()

    @precondition(lambda self: self.model.sequences)
    @rule(pick=picks)
    def preempt_and_resume(self, pick: int) -> None:
        sequence = self.sequence(pick)
        self.release(pick)
        self.acquire(sequence.space, sequence.tokens, len(sequence.tokens), ())

    @rule()
    def clear(self) -> None:
        kept = {p: t for p, t in self.model.cached.items() if p in self.model.pinned()}
        assert self.store.clear() == len(self.model.cached) - len(kept)
        self.model.cached = kept

    @rule(space=spaces)
    def clear_namespace(self, space: int) -> None:
        pinned = self.model.pinned()
        kept = {p: t for p, t in self.model.cached.items() if p[0] != space or p in pinned}
        assert self.store.clear(NAMESPACES[space]) == len(self.model.cached) - len(kept)
        self.model.cached = kept

    @rule(space=spaces, text=texts, length=lengths, tail=tails, n_last=st.integers(0, 1))
    def explain(self, space: int, text: Tokens, length: int, tail: Tokens, n_last: int) -> None:
        before, tokens = self.snapshot(), text[:length] + tail
        explained = self.store.explain(tokens, NAMESPACES[space], n_last)
        assert self.snapshot() == before
        assert explained == self.store.explain(tokens, NAMESPACES[space], n_last)
        reasons = [each.reason for each in explained.ranges for _ in range(each.tokens)]
        assert reasons == [self.model.reason(space, tokens, n_last, i) for i in range(len(tokens))]
        reusable = tokens[: len(tokens) - n_last]
        assert explained.hit_tokens == self.store.match_tokens(reusable, NAMESPACES[space])
        self.assert_divergence(explained.divergence, space, reusable, explained.hit_tokens)

    @rule(space=spaces, max_chunks=st.integers(1, 40), max_depth=st.none() | st.integers(1, 4))
    def draw(self, space: int, max_chunks: int, max_depth: int | None) -> None:
        model, before = self.model, self.snapshot()
        drawn = self.store.snapshot(NAMESPACES[space], max_chunks, max_depth=max_depth, with_tokens=True)
        assert self.snapshot() == before
        cached = {tokens for at, tokens in model.cached if at == space}
        paths: dict[str | None, Tokens] = {None: ()}
        shown: set[Tokens] = set()
        for branch in drawn.branches:
            above = paths[branch.parent]
            path = paths[branch.id] = above + branch.token_ids
            chunks = {path[:end] for end in range(len(above) + model.chunk, len(path) + 1, model.chunk)}
            assert (branch.depth * model.chunk, branch.chunks) == (len(above), len(chunks))
            assert not chunks & shown
            shown |= chunks
            for chunk in chunks:
                held = [s for s in model.sequences if s.space == space and model.node(s)[1][: len(chunk)] == chunk]
                assert branch.sharers == len(held)
            assert branch.children == sum(c[: -model.chunk] == path for c in cached)
        assert shown <= cached
        assert drawn.cached_chunks == len(cached)
        for branch in drawn.branches:
            hanging = [c for c in cached - shown if c[: -model.chunk] == paths[branch.id]]
            assert branch.hidden_children == len(hanging)
        assert drawn.hidden_children == sum(len(c) == model.chunk for c in cached - shown)
        assert len(shown) == drawn.shown_chunks <= max_chunks
        if max_depth is not None:
            assert all(len(chunk) <= max_depth * model.chunk for chunk in shown)
        elif max_chunks >= len(cached):  # no parent here has more than the eight children that are always shown
            assert shown == cached

    @rule(space=spaces, text=texts, length=lengths, tail=tails)
    def look(self, space: int, text: Tokens, length: int, tail: Tokens) -> None:
        before, tokens = self.snapshot(), text[:length] + tail
        assert self.store.awaited(tokens, NAMESPACES[space]) == self.model.claimed(space, tokens)
        assert self.snapshot() == before

    # -- after every operation -----------------------------------------------------------------------------------------

    @invariant()
    def store_is_consistent(self) -> None:
        self.store.check()

    @invariant()
    def leases_hold_exactly_their_prefix(self) -> None:
        for sequence in self.model.sequences:
            self.assert_exact(sequence.lease, sequence.space, sequence.tokens)

    @invariant()
    def store_equals_model(self) -> None:
        model, stats = self.model, self.store.stats()
        assert stats.cached_chunks == len(model.cached)
        for space, tokens in model.cached:
            assert self.store.match_tokens(tokens, NAMESPACES[space]) == len(tokens)
        assert stats.free_chunks == model.free()
        assert stats.leased_chunks == len(model.pinned()) + stats.private_chunks
        assert stats.claims == sum(s.claim is not None for s in model.sequences)
        for space, namespace in enumerate(NAMESPACES):
            own, mine = self.store.namespace_stats(namespace), [s for s in model.sequences if s.space == space]
            assert own.cached_chunks == sum(prefix[0] == space for prefix in model.cached)
            assert own.leases == len(mine)
            assert own.private_chunks == sum(s.n_slots - s.published for s in mine)
            assert own.leased_chunks == own.private_chunks + sum(prefix[0] == space for prefix in model.pinned())
            for kind in ("hit_tokens", "evicted_tokens", "unfinished_tokens", "new_tokens"):
                assert getattr(own, kind) == model.tokens[space, kind]
        for sequence in model.sequences:
            assert len(sequence.lease.slots) == sequence.n_slots
            assert len(sequence.lease.shared_slots) == sequence.published
            assert sequence.lease.committed_tokens == len(sequence.tokens)

    def teardown(self) -> None:
        """Release everything: nothing leaks, and what is cached is exact."""
        for sequence in list(self.model.sequences):
            sequence.lease.release()
        for space, tokens in self.model.cached:
            with self.store.acquire(tokens, NAMESPACES[space]) as lease:
                assert lease.cached_tokens == len(tokens)
                self.assert_exact(lease, space, tokens)
        stats = self.store.stats()
        assert stats.free_chunks + stats.cached_chunks == stats.total_chunks
        assert stats.hit_tokens + stats.miss_tokens >= 0
        self.store.clear()
        self.store.check()
        assert self.store.stats().free_chunks == stats.total_chunks

    # -- helpers -------------------------------------------------------------------------------------------------------

    def sequence(self, pick: int) -> Sequence:
        return self.model.sequences[pick % len(self.model.sequences)]

    def try_reserve(self, sequence: Sequence, n_tokens: int) -> bool:
        missing = max(0, -(-n_tokens // self.model.chunk) - sequence.n_slots)
        if not self.model.has_room(missing):
            before = self.snapshot()
            with pytest.raises(CapacityError):
                sequence.lease.reserve(n_tokens)
            assert self.snapshot() == before
            return False
        self.model.make_room(missing)
        sequence.lease.reserve(n_tokens)
        sequence.n_slots += missing
        return True

    def assert_divergence(self, divergence: Divergence | None, space: int, reusable: Tokens, n_hits: int) -> None:
        """Told if and only if something cached goes on otherwise, and then as it does."""
        onward = {t for at, t in self.model.cached if at == space and t[:n_hits] == reusable[:n_hits] and t[n_hits:]}
        assert (divergence is not None) == (n_hits < len(reusable) and bool(onward))
        if divergence is not None:
            assert divergence.position == n_hits
            assert divergence.cached[0] != reusable[n_hits]
            assert any(t[n_hits:][: len(divergence.cached)] == divergence.cached for t in onward)

    def snapshot(self) -> object:
        return self.store.stats(), [list(s.lease.slots) for s in self.model.sequences]

    def assert_exact(self, lease: Lease, space: int, tokens: Tokens) -> None:
        for position in range(len(tokens)):
            index, offset = divmod(position, self.model.chunk)
            assert self.memory[lease.slots[index]][offset] == (space, tokens[: position + 1])


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=100, stateful_step_count=50)


@pytest.mark.parametrize("seed", range(10))
def test_long_histories(seed: int) -> None:
    """Hypothesis prefers short histories; these are long enough to fill the pool and turn it over many times."""
    random = Random(seed)
    machine = StoreMachine()
    machine.start(total=random.choice([6, 12, 24, 48]), chunk=random.choice([1, 2, 3, 4]))
    for _ in range(400):
        random_step(machine, random)
        machine.store_is_consistent()
        machine.leases_hold_exactly_their_prefix()
        machine.store_equals_model()
    stats = machine.store.stats()
    assert min(stats.hit_tokens, stats.evicted_chunks, stats.deduplicated_chunks) > 0, "the history was too tame"
    machine.teardown()


def random_step(machine: StoreMachine, random: Random) -> None:
    space, pick, text = random.randrange(2), random.randrange(1_000), random.choice(TEXTS)
    length, n, tail = random.randint(1, 17), random.randint(1, 9), tuple(random.choices([0, 1], k=random.randrange(3)))
    n_live = len(machine.model.sequences)
    actions: list[tuple[int, Callable[[], None]]] = [
        (8 if n_live < 6 else 0, lambda: machine.acquire(space, text, length, tail)),
        (4, lambda: machine.look(space, text, length, tail)),
        (8, lambda: machine.explain(space, text, length, tail, random.randrange(2))),
        (2, lambda: machine.draw(space, random.randint(1, 40), random.choice([None, None, 1, 3]))),
        (1 if n_live < 6 else 0, lambda: machine.pin(space, text, length, tail)),
        (0 if random.random() < 0.9 else 1, lambda: machine.clear_namespace(space)),
        (0 if random.random() < 0.9 else 1, machine.clear),
    ]
    if n_live:
        actions += [
            (20, lambda: machine.compute(pick, text, n, tail)),
            (4, lambda: machine.claim(pick, text, length)),
            (2, lambda: machine.reserve(pick, random.randint(0, 30))),
            (3, lambda: machine.fork(pick, random.randrange(1_000))),
            (6, lambda: machine.release(pick)),
            (2, lambda: machine.preempt_and_resume(pick)),
        ]
    weights, calls = zip(*actions, strict=True)
    random.choices(calls, weights)[0]()
