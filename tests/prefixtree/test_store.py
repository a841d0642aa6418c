"""The store through its public face, case by case (`test_store_machine.py` does it at random). Chunks have 4 tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from stemcache.prefixtree.errors import CapacityError, InvariantError, StoreError
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.store import Lease, PrefixStore

MakeStore = Callable[[int], PrefixStore]


def fill(store: PrefixStore, namespace: Namespace, tokens: Sequence[int]) -> list[int]:
    """Run a sequence to its end and return the slots that it had."""
    with store.acquire(tokens, namespace) as lease:
        lease.reserve(len(tokens))
        lease.commit(tokens)
        slots = list(lease.slots)
    store.check()
    return slots


def test_full_chunks_are_shared_and_the_tail_is_private(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(8)
    with store.acquire(range(10), namespace) as first, store.acquire(range(10), namespace) as second:
        assert first.cached_tokens == 0
        first.reserve(10)
        first.commit(range(10))
        second.reserve(10)
        mine = list(second.slots)
        second.commit(range(10))
        assert second.slots[:2] == first.slots[:2], "equal chunks are kept once"
        assert second.slots[2] == mine[2] != first.slots[2]
        assert store.stats().deduplicated_chunks == 2
        store.check()
    assert store.stats().cached_chunks == 2
    assert store.stats().free_chunks == 6


def test_one_more_sharer_costs_its_tail_only(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(40)
    fill(store, namespace, range(100))
    free = store.stats().free_chunks
    with store.acquire([*range(100), 7], namespace) as lease:
        lease.reserve(101)
        assert lease.cached_tokens == 100
        assert store.stats().free_chunks == free - 1


def test_divergence_inside_a_chunk_copies_the_tokens_before_it(
    make_store: MakeStore, namespace: Namespace, copies: Any
) -> None:
    store = make_store(8)
    slots = fill(store, namespace, range(8))
    with store.acquire([0, 1, 2, 3, 4, 5, 99], namespace) as lease:
        assert lease.cached_tokens == 6
        assert copies.calls == [(slots[1], lease.slots[1], 2)]
        assert lease.shared_slots == slots[:1]
        store.check()


def test_without_a_slot_for_the_copy_fewer_tokens_are_cached(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(2)
    fill(store, namespace, range(8))
    with store.acquire([0, 1, 2, 3, 4, 9], namespace) as lease:  # both chunks are source or on the way to it
        assert lease.cached_tokens == 4
        assert store.stats().evicted_chunks == 0
        store.check()


def test_a_failing_copy_leaks_nothing(make_store: MakeStore, namespace: Namespace, copies: Any) -> None:
    store = make_store(8)
    fill(store, namespace, range(8))
    lease = store.acquire(range(8), namespace)
    lease.reserve(10)
    lease.commit(range(10))
    before = store.stats()
    copies.error = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        store.acquire([0, 1], namespace)
    with pytest.raises(RuntimeError, match="device lost"):
        lease.fork(10)
    store.check()
    assert store.stats() == before


def test_reserve_evicts_what_is_not_leased_and_only_that(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(4)
    fill(store, namespace, [1] * 8)
    fill(store, namespace, [2] * 8)
    with store.acquire([1] * 8, namespace) as lease:
        lease.reserve(16)
        store.check()
        assert lease.cached_tokens == 8
        assert store.match_tokens([2] * 8, namespace) == 0
        with pytest.raises(CapacityError, match="1 chunks needed, 0 free and 0 evictable of 4"):
            lease.reserve(17)
        assert lease.capacity_tokens == 16
    assert store.stats().free_chunks == 2


def test_a_full_pool_is_evicted_a_sixteenth_at_a_time(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(64)
    fill(store, namespace, [1] * 256)
    with store.acquire([2], namespace) as lease:
        lease.reserve(1)
        assert store.stats().evicted_chunks == 4
        lease.reserve(20)
        assert store.stats().evicted_chunks == 8


def test_a_reservation_that_cannot_be_met_evicts_nothing(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(4)
    fill(store, namespace, [1] * 12)
    with store.acquire([2], namespace) as lease:
        with pytest.raises(CapacityError, match="5 chunks needed, 1 free and 3 evictable"):
            lease.reserve(20)
        assert lease.slots == []
        assert store.match_tokens([1] * 12, namespace) == 12


def test_decoding_publishes_each_chunk_when_it_is_full(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(16)
    tokens = [5, 6]
    with store.acquire(tokens, namespace) as lease:
        for token in range(20):
            lease.reserve(len(tokens))
            lease.commit(tokens)
            assert store.match_tokens(tokens, namespace) == len(tokens) // 4 * 4
            tokens.append(token)
        assert lease.slots == list(range(lease.slots[0], lease.slots[0] + len(lease.slots))), "it grew as one run"


def test_the_caller_is_told_its_mistakes(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(4)
    lease = store.acquire([1, 2, 3], namespace)
    lease.reserve(3)
    lease.commit([1, 2, 3])
    with pytest.raises(ValueError, match="commit of 2 tokens: 3 are committed, 4 have a slot"):
        lease.commit([1, 2])
    with pytest.raises(ValueError, match="commit of 5 tokens: 3 are committed, 4 have a slot"):
        lease.commit([1, 2, 3, 4, 5])
    for n_tokens in (-1, 4):
        with pytest.raises(ValueError, match=f"fork at {n_tokens} tokens: 3 are committed"):
            lease.fork(n_tokens)
    before = store.stats()
    uses: list[Callable[[], object]] = [
        lambda: store.acquire([-1], namespace),
        lambda: lease.claim([-1]),
        lambda: lease.commit([1, 2, 3, -1]),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="token ids"):
            use()
    assert lease.committed_tokens == 3
    assert store.stats() == before
    store.check()


def test_a_released_lease_holds_nothing_and_refuses_work(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(4)
    with store.acquire([1], namespace) as lease:
        lease.reserve(4)
    lease.release()
    assert lease.released
    assert lease.slots == []
    assert lease.capacity_tokens == 0
    uses: list[Callable[[], object]] = [
        lambda: lease.reserve(1),
        lambda: lease.commit([1]),
        lambda: lease.claim([1]),
        lambda: lease.fork(0),
    ]
    for use in uses:
        with pytest.raises(StoreError, match="released"):
            use()
    assert store.stats().free_chunks == 4


def test_an_exception_in_the_with_block_releases(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(4)

    def fail_inside() -> None:
        with store.acquire([1], namespace) as lease:
            lease.reserve(9)
            lease.reserve(99)

    with pytest.raises(CapacityError):
        fail_inside()
    assert store.stats().free_chunks == 4
    assert store.stats().leases == 0


def test_fork_shares_full_chunks_and_copies_the_tail(make_store: MakeStore, namespace: Namespace, copies: Any) -> None:
    store = make_store(8)
    with store.acquire(range(10), namespace) as parent:
        parent.reserve(10)
        parent.commit(range(10))
        with parent.fork(10) as child, parent.fork(6) as early, parent.fork(8) as whole, parent.fork(0) as empty:
            store.check()
            assert child.slots[:2] == parent.slots[:2]
            assert early.slots[:1] == parent.slots[:1]
            assert whole.slots == parent.slots[:2]
            assert empty.slots == []
            assert [lease.cached_tokens for lease in (child, early, whole, empty)] == [10, 6, 8, 0]
            assert copies.calls == [
                (parent.slots[2], child.slots[2], 2),
                (parent.slots[1], early.slots[1], 2),
            ]
    store.check()


def test_clear_spares_what_is_leased(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(8)
    fill(store, namespace, [1] * 8)
    fill(store, namespace, [2] * 8)
    with store.acquire([1] * 4, namespace):
        assert store.clear() == 3
        assert store.match_tokens([1] * 8, namespace) == 4
    assert store.clear() == 1
    store.check()


def test_tenants_do_not_see_each_other(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(8)
    fill(store, namespace, range(8))
    other = Namespace.of(model="m", dtype="float32", tenant="t")
    assert store.match_tokens(range(8), other) == 0
    with store.acquire(range(8), namespace) as lease:
        lease.claim(range(16))
        assert store.awaited(range(16), namespace)
        assert not store.awaited(range(16), other)


def test_stats_count_hits_and_misses_in_tokens(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(8)
    fill(store, namespace, range(8))
    store.acquire([*range(6), 99], namespace).release()
    stats = store.stats()
    assert (stats.acquires, stats.hit_tokens, stats.miss_tokens, stats.copied_tokens) == (2, 6, 9, 2)
    assert stats.free_chunks + stats.cached_chunks + stats.private_chunks == stats.total_chunks == 8


# -- claims ------------------------------------------------------------------------------------------------------------


def test_a_burst_of_equal_prompts_is_computed_once(make_store: MakeStore, namespace: Namespace) -> None:
    """Ten requests; the scheduler computes three tokens per step and sequence and skips requests that are awaited."""
    store = make_store(64)
    prompt = list(range(18))
    waiting, running = 10, []
    computed = 0
    for _ in range(40):
        while waiting and not store.awaited(prompt, namespace):
            waiting -= 1
            lease = store.acquire(prompt[:-1], namespace)
            lease.reserve(len(prompt))
            lease.claim(prompt)
            running.append(lease)
        for lease in running:
            step = min(3, len(prompt) - lease.committed_tokens)
            computed += step
            lease.commit(prompt[: lease.committed_tokens + step])
        store.check()
    assert waiting == 0
    assert all(lease.committed_tokens == len(prompt) for lease in running)
    assert computed == len(prompt) + 9 * 2, "the 16 tokens of full chunks once, the private tail of 2 by everyone"
    assert store.stats().deduplicated_chunks == 0


def test_two_leases_never_claim_one_chunk(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(8)
    with store.acquire([], namespace) as first, store.acquire([], namespace) as second:
        for lease in (first, second):
            lease.reserve(8)
            lease.claim(range(8))
        assert store.stats().claims == 1
        first.release()  # gives up: the other takes over at its next chunk
        assert not store.awaited(range(8), namespace)
        second.commit(range(4))
        assert store.awaited(range(8), namespace)
        store.check()


def test_a_claim_moves_on_whoever_publishes_the_chunk(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(8)
    with store.acquire([], namespace) as slow, store.acquire([], namespace) as fast:
        slow.claim(range(12))
        fast.reserve(8)
        fast.commit(range(8))
        store.check()
        assert store.awaited(range(12), namespace)
        assert not store.awaited(range(11), namespace), "no full chunk is left to wait for"
        fast.release()
        assert store.clear() == 0, "the path to a claimed chunk stays"


def test_a_claim_ends_with_its_lease_or_its_prompt(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(8)
    lease = store.acquire([], namespace)
    lease.claim(range(9))
    lease.claim([7] * 9)
    assert not store.awaited(range(9), namespace), "a second claim replaces the first"
    assert store.awaited([7] * 9, namespace)
    lease.reserve(12)
    lease.commit([7] * 9)
    assert store.stats().claims == 0
    lease.claim([7] * 12)
    assert store.stats().claims == 1
    lease.release()
    assert store.stats().claims == 0
    store.check()


# -- check() -----------------------------------------------------------------------------------------------------------


def lose_a_slot(store: PrefixStore, lease: Lease) -> None:
    store._ledger.private.remove(lease.slots[-1])


def share_a_private_slot(store: PrefixStore, lease: Lease) -> None:
    lease.slots[-1] = lease.slots[0]


def free_a_cached_slot(store: PrefixStore, lease: Lease) -> None:
    store._ledger.slots.free([lease.slots[0]])


def forget_a_lease(store: PrefixStore, lease: Lease) -> None:
    store._leases.clear()


def change_the_path(store: PrefixStore, lease: Lease) -> None:
    lease.slots[0], lease.slots[1] = lease.slots[1], lease.slots[0]


def forget_a_claim(store: PrefixStore, lease: Lease) -> None:
    assert lease._claim is not None
    lease._claim.chunk = None


def uncommit(store: PrefixStore, lease: Lease) -> None:
    lease._committed = 3


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lose_a_slot, "must be one of free, cached, private"),
        (share_a_private_slot, "private slots"),
        (free_a_cached_slot, "must be one of free, cached, private"),
        (forget_a_lease, "other pins"),
        (change_the_path, "other slots than its path"),
        (forget_a_claim, "holds another"),
        (uncommit, "committed only 3 tokens"),
    ],
)
def test_check_names_what_is_broken(
    make_store: MakeStore, namespace: Namespace, break_it: Callable[[PrefixStore, Lease], None], message: str
) -> None:
    store = make_store(8)
    lease = store.acquire([], namespace)
    lease.claim(range(16))
    lease.reserve(10)
    lease.commit(range(10))
    store.check()
    break_it(store, lease)
    with pytest.raises(InvariantError, match=message):
        store.check()


def test_a_lease_counts_what_it_computed_and_published_first(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(8)
    with store.acquire(range(10), namespace) as first, store.acquire(range(10), namespace) as second:
        for lease in (first, second):
            lease.reserve(10)
            lease.commit(list(range(10)))
        assert (first.written_tokens, second.written_tokens) == (8, 0)
    other = [0, 1, 2, 3, 4, 5, 9, 9, 9]
    with store.acquire(other, namespace) as diverging:
        assert diverging.cached_tokens == 6
        diverging.reserve(len(other))
        diverging.commit(other)
        assert diverging.written_tokens == 2  # of the second chunk two tokens were copied, two computed
