"""The public corpus: everybody finds it, nobody finds what others put behind it, and copies hold what they should."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.prefixtree.explain import Reason
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.store import PrefixStore

CHUNK = 4
SETTINGS = settings(max_examples=60)

# Two tokens only, so that most prompts collide. 0 is the operator, who writes the corpus; the others are tenants.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=18)
visits = st.lists(st.tuples(st.sampled_from([0, 1, 2]), prompts), max_size=40)


def namespace(tenant: int) -> Namespace:
    return Namespace.of(model="m", dtype="float32", tenant=str(tenant))


class Memory:
    """A pool of tokens in place of their keys and values, each with all tokens before it."""

    def __init__(self, n_chunks: int) -> None:
        self.slots: dict[int, list[tuple[int, ...]]] = {slot: [] for slot in range(n_chunks)}
        self.store = PrefixStore(n_chunks, CHUNK, self.copy)
        self.store.share(namespace(0))

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        assert len(self.slots[source]) >= n_tokens
        self.slots[target] = self.slots[source][:n_tokens]

    def visit(self, tenant: int, prompt: Sequence[int]) -> int:
        """Read a prompt and leave it cached; returns how much was cached before, having looked at every token of it."""
        found = self.store.match_tokens(prompt, namespace(tenant))
        explained = self.store.explain(prompt, namespace(tenant))
        with self.store.acquire(prompt, namespace(tenant)) as lease:
            assert lease.cached_tokens <= found == explained.hit_tokens
            lease.reserve(len(prompt))
            for position in range(lease.cached_tokens, len(prompt)):
                chunk = self.slots[lease.slots[position // CHUNK]]
                chunk[position % CHUNK :] = [tuple(prompt[: position + 1])]
            lease.commit(prompt)
            read = [entry for slot in lease.slots for entry in self.slots[slot]]
            assert read[: len(prompt)] == [tuple(prompt[: i + 1]) for i in range(len(prompt))]
            return lease.cached_tokens


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@SETTINGS
@given(visits)
def test_a_tenant_finds_its_own_and_the_corpus_and_nothing_else(history: list[tuple[int, list[int]]]) -> None:
    memory, written = Memory(1000), {0: [], 1: [], 2: []}
    for tenant, prompt in history:
        known = written[tenant] + written[0]
        expected = max((common(prompt, text[: len(text) // CHUNK * CHUNK]) for text in known), default=0)
        assert memory.visit(tenant, prompt) == expected
        written[tenant].append(prompt)
    memory.store.check()


@SETTINGS
@given(visits, st.integers(5, 12))
def test_a_pool_that_evicts_holds_the_right_tokens(history: list[tuple[int, list[int]]], n_chunks: int) -> None:
    memory = Memory(n_chunks)
    for tenant, prompt in history:
        memory.visit(tenant, prompt)
        memory.store.check()
    assert memory.store.stats().leases == 0


def test_where_there_are_no_slots_for_copies_the_rest_is_computed() -> None:
    memory = Memory(5)
    text = [1] * 16
    memory.visit(0, text)
    with memory.store.pin(text, namespace(0)):  # four of the five slots
        with memory.store.acquire(text, namespace(1)) as lease:
            assert lease.cached_tokens == CHUNK
        memory.store.check()
    assert memory.visit(1, text) > 0


def test_clearing_a_tenant_leaves_the_corpus_and_the_other_way_round() -> None:
    memory, text = Memory(50), [1, 0] * 8
    memory.visit(0, text)
    assert memory.visit(1, text) == memory.visit(1, text) == 16
    memory.store.clear(namespace(1))
    assert memory.store.namespace_stats(namespace(1)).cached_chunks == 0
    assert memory.visit(2, text) == 16
    memory.store.clear(namespace(0))
    assert memory.visit(2, text) == 16, "its own by now"
    assert memory.visit(1, text) == 0


def test_explained_as_what_it_is() -> None:
    memory, text = Memory(50), [1, 0] * 8
    memory.visit(0, text)
    told = memory.store.explain([*text[:10], 7, 7], namespace(1), n_last=1)
    assert [(each.tokens, each.reason) for each in told.ranges] == [
        (10, Reason.PUBLIC),
        (1, Reason.NEVER_SEEN),
        (1, Reason.LAST_TOKEN),
    ]
    assert told.divergence is not None
    assert told.divergence.position == 10


def test_a_failing_copy_leaks_nothing() -> None:
    memory, text = Memory(50), [1, 0] * 8
    memory.visit(0, text)
    copy, calls = memory.copy, []

    def failing(*given: int) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise RuntimeError("the device is gone")
        copy(*given)

    memory.store._ledger._copy_tokens = failing
    with pytest.raises(RuntimeError):
        memory.store.acquire(text, namespace(1))
    memory.store.check()
    assert memory.store.stats().leases == 0
    memory.store._ledger._copy_tokens = copy
    assert memory.visit(1, text) == 16
