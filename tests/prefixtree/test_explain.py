"""Explanations and snapshots, case by case (`test_store_machine.py` does it at random). Chunks have 4 tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from stemcache.prefixtree import explain as explain_module
from stemcache.prefixtree.accounts import Accounts
from stemcache.prefixtree.errors import CapacityError
from stemcache.prefixtree.evicted import EvictedChunks
from stemcache.prefixtree.explain import Divergence, Reason, TokenRange
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import chain_digest
from stemcache.prefixtree.store import PrefixStore

MakeStore = Callable[[int], PrefixStore]
OTHER = Namespace.of(model="m", dtype="float32", tenant="other")


def fill(store: PrefixStore, namespace: Namespace, tokens: Sequence[int]) -> None:
    with store.acquire(tokens, namespace) as lease:
        lease.reserve(len(tokens))
        lease.commit(tokens)


def told(store: PrefixStore, namespace: Namespace, tokens: Sequence[int], n_last: int = 0) -> list[tuple[int, str]]:
    """The ranges as (number of tokens, reason)."""
    return [(each.tokens, each.reason.value) for each in store.explain(tokens, namespace, n_last).ranges]


def test_a_date_before_a_document(make_store: MakeStore, namespace: Namespace) -> None:
    store, document = make_store(16), list(range(10, 22))
    fill(store, namespace, [1, 2, 3, 20, *document])
    explained = store.explain([1, 2, 3, 21, *document, 99], namespace, n_last=1)
    assert [(each.start, each.stop, each.reason) for each in explained.ranges] == [
        (0, 3, Reason.PARTIAL_CHUNK),
        (3, 4, Reason.NEVER_SEEN),
        (4, 16, Reason.OTHER_POSITION),
        (16, 17, Reason.LAST_TOKEN),
    ]
    assert explained.divergence == Divergence(3, (20, *document))
    assert explained.hit_tokens == 3
    assert explained.tokens_of(Reason.OTHER_POSITION) == 12


def test_a_lease_tells_what_was_lost(make_store: MakeStore, namespace: Namespace) -> None:
    store, prompt = make_store(8), list(range(16))
    fill(store, namespace, prompt)
    with store.acquire(prompt[:6], namespace) as short:
        assert (short.cached_tokens, short.evicted_tokens) == (6, 0)
        store.clear(namespace)  # all but the first chunk, which is held
    with store.acquire([*prompt[:12], 99, 99, 99, 99], namespace) as lease:
        assert (lease.cached_tokens, lease.evicted_tokens) == (4, 8)
    with store.acquire([9, *prompt], namespace) as other:
        assert (other.cached_tokens, other.evicted_tokens) == (0, 0)


def test_a_snapshot_tells_what_was_stored_below(make_store: MakeStore, namespace: Namespace) -> None:
    """One object holds several chunks, and its last one is marked: so what leads to a marked chunk is stored too."""
    store = make_store(16)
    fill(store, namespace, range(16))
    fill(store, namespace, [*range(8), 90, 91, 92, 93])
    chunks = {(node.depth, node.key[-1]): node for node in store.chunks(namespace)}
    assert [each.stored_chunks for each in store.snapshot(namespace, 99).branches] == [0, 0, 0]
    chunks[3, 11].is_cold = True
    stored = {each.depth: each.stored_chunks for each in store.snapshot(namespace, 99).branches if each.chunks == 2}
    assert stored == {0: 2, 2: 1}
    chunks[4, 15].is_covered = True
    assert [(each.chunks, each.stored_chunks) for each in store.snapshot(namespace, 99).branches] == [
        (2, 2),
        (1, 0),
        (2, 2),
    ]


def test_text_that_moved_by_a_token_is_found(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(16)
    fill(store, namespace, range(8))
    assert told(store, namespace, [9, *range(8), 7]) == [
        (1, "never_seen"),
        (8, "other_position"),
        (1, "unfinished_chunk"),
    ]


def test_the_last_token_is_computed_even_if_it_is_cached(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(4)
    fill(store, namespace, range(8))
    assert told(store, namespace, range(8)) == [(8, "hit")]
    assert told(store, namespace, range(8), n_last=1) == [(4, "hit"), (3, "partial_chunk"), (1, "last_token")]
    assert store.explain(range(8), namespace, n_last=1).divergence is None


def test_what_was_evicted_is_not_called_new(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(4)
    fill(store, namespace, range(12))
    fill(store, namespace, range(50, 62))  # takes two of the first three chunks
    expected = [(4, "hit"), (8, "evicted"), (4, "never_seen"), (1, "unfinished_chunk")]
    assert told(store, namespace, [*range(12), 7, 7, 7, 7, 7]) == expected
    fill(store, namespace, range(12))
    assert told(store, namespace, range(12)) == [(12, "hit")]


def test_an_account_tells_losses_from_news(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(4)
    fill(store, namespace, range(12))
    fill(store, namespace, range(50, 62))
    fill(store, namespace, [*range(12), 7])
    own = store.namespace_stats(namespace)
    assert (own.acquires, own.hit_tokens, own.evicted_tokens, own.unfinished_tokens, own.new_tokens) == (3, 4, 8, 1, 24)
    assert own.evicted_chunks == store.stats().evicted_chunks == 5
    assert store.namespace_stats(OTHER).evicted_chunks == 0


def test_what_is_being_computed_is_pending(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(8)
    with store.acquire([], namespace) as lease:
        lease.reserve(10)
        lease.claim(range(10))
        assert told(store, namespace, [*range(10), 3]) == [(8, "pending"), (3, "unfinished_chunk")]
        assert told(store, namespace, [*range(6), 3, 3, 3]) == [
            (6, "pending"),
            (2, "never_seen"),
            (1, "unfinished_chunk"),
        ]
        assert told(store, OTHER, range(8)) == [(8, "never_seen")]
    assert told(store, namespace, range(8)) == [(8, "never_seen")]


def test_another_namespace_is_not_looked_at(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(8)
    fill(store, namespace, range(8))
    store.clear(namespace)
    fill(store, namespace, range(20, 28))
    for prompt in (range(8), range(20, 28), [9, *range(20, 28)]):
        explained = store.explain(prompt, OTHER)
        assert {each.reason for each in explained.ranges} <= {Reason.NEVER_SEEN, Reason.UNFINISHED_CHUNK}
        assert explained.divergence is None
    assert store.snapshot(OTHER, 10).branches == ()
    assert store.clear(OTHER) == 0


def test_another_namespace_of_the_same_owner_is_named(make_store: MakeStore, namespace: Namespace) -> None:
    """As far as it goes beyond the prompt's own namespace."""
    store = make_store(8)
    fill(store, namespace, range(8))
    fill(store, OTHER, range(4))
    explained = store.explain([*range(6), 50, 51, 52], OTHER, 1, [namespace])
    assert [(each.tokens, each.reason) for each in explained.ranges] == [
        (4, Reason.HIT),
        (2, Reason.OTHER_NAMESPACE),
        (2, Reason.NEVER_SEEN),
        (1, Reason.LAST_TOKEN),
    ]
    assert store.explain(range(4), OTHER, 0, [namespace]).ranges == (TokenRange(0, 4, Reason.HIT),)


def test_nothing_to_explain(make_store: MakeStore, namespace: Namespace) -> None:
    assert make_store(2).explain([], namespace).ranges == ()
    with pytest.raises(ValueError, match="n_last must be from 0 to 2"):
        make_store(2).explain([1, 2], namespace, n_last=3)


def test_the_search_is_bounded_and_says_so(
    make_store: MakeStore, namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(8)
    for start in (0, 10, 20):
        fill(store, namespace, range(start, start + 4))
    moved = [9, *range(4)]
    assert store.explain(moved, namespace).searched_all
    assert told(store, namespace, moved) == [(1, "never_seen"), (4, "other_position")]
    monkeypatch.setattr(explain_module, "MAX_SEARCHED", 2)  # the two inserted last
    assert not store.explain(moved, namespace).searched_all
    assert told(store, namespace, moved) == [(4, "never_seen"), (1, "unfinished_chunk")]


def test_the_memory_of_evictions_is_bounded_and_forgets_the_oldest() -> None:
    root, keys = b"r" * 32, [bytes([letter]) for letter in b"abc"]
    digests, digest = [], root
    for key in keys:
        digest = chain_digest(digest, key)
        digests.append(digest)
    evicted = EvictedChunks(limit=3)
    for each in reversed(digests):  # a child goes before its parent
        evicted.remember(each)
    assert evicted.count_run(root, keys) == 3
    evicted.remember(digests[2])  # was cached and evicted once more: the latest now
    evicted.remember(b"another")
    assert len(evicted) == 3
    assert evicted.count_run(root, keys) == 1
    assert evicted.count_run(root, [b"x", *keys]) == 0


def test_a_prompt_that_could_not_start_does_not_count(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(4)
    fill(store, namespace, range(8))
    before = store.namespace_stats(namespace), store.stats()
    for _ in range(3):
        lease = store.acquire([*range(6), 90, 91, 92], namespace)
        assert store.namespace_stats(namespace).acquires == before[0].acquires + 1
        with pytest.raises(CapacityError):
            lease.reserve(99)
        lease.release(used=False)
    after = store.namespace_stats(namespace), store.stats()
    assert after == (before[0], replace(before[1], copied_tokens=before[1].copied_tokens + 6))
    with store.pin(range(8), namespace) as pin:
        pin.release(used=False)
    assert store.namespace_stats(namespace) == before[0]


def test_accounts_are_bounded() -> None:
    accounts = Accounts(limit=2)
    accounts.of(b"a").acquires = 5
    accounts.of(b"b").acquires = 7
    accounts.of(b"a")
    accounts.of(b"c")
    assert (len(accounts), accounts.of(b"a").acquires, accounts.of(b"b").acquires) == (2, 5, 0)


def test_a_snapshot_joins_chains_and_tells_sharers(make_store: MakeStore, namespace: Namespace) -> None:
    #  0..3 - 4..7 -- 8..11 - 12..15
    #              \- 20..23
    store = make_store(16)
    fill(store, namespace, range(16))
    fill(store, namespace, [*range(8), 20, 21, 22, 23])
    with store.acquire(range(12), namespace), store.acquire(range(12), namespace):
        drawn = store.snapshot(namespace, 10, with_tokens=True)
        found = {each.token_ids: (each.depth, each.chunks, each.sharers, each.children) for each in drawn.branches}
    assert found == {
        tuple(range(8)): (0, 2, 2, 2),
        (20, 21, 22, 23): (2, 1, 0, 0),
        tuple(range(8, 12)): (2, 1, 2, 1),  # not joined with what follows: that has other sharers
        tuple(range(12, 16)): (3, 1, 0, 0),
    }
    names = {each.token_ids: each.id for each in drawn.branches}
    again = store.snapshot(namespace, 10, with_tokens=True)
    assert [each.token_ids for each in again.branches] == [tuple(range(8)), (20, 21, 22, 23), tuple(range(8, 16))]
    assert all(each.id == names[each.token_ids] for each in again.branches[:2])


def test_a_wide_level_leaves_room_for_what_is_below(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(64)
    for letter in range(20):
        fill(store, namespace, [letter] * 12)
    drawn = store.snapshot(namespace, 16)
    assert (drawn.children, drawn.hidden_children, drawn.shown_chunks, drawn.cached_chunks) == (20, 12, 16, 60)
    assert [each.chunks for each in drawn.branches] == [2] * 8
    assert all((each.children, each.hidden_children) == (1, 1) for each in drawn.branches)
    assert store.snapshot(namespace, 16, max_depth=1).shown_chunks == 8


def test_idle_time_is_that_of_what_hangs_below(make_store: MakeStore, namespace: Namespace) -> None:
    store = make_store(8)
    fill(store, namespace, range(8))
    fill(store, namespace, [*range(4), 9, 9, 9, 9])
    fill(store, namespace, range(8))
    top, older, newer = store.snapshot(namespace, 8, with_tokens=True).branches
    assert older.token_ids == (9, 9, 9, 9)
    assert 0 <= top.idle_seconds == newer.idle_seconds <= older.idle_seconds
    with store.acquire(range(4), namespace):
        top, *_ = store.snapshot(namespace, 8).branches
        assert top.idle_seconds == 0
