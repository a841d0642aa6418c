"""Leases that keep a part of their tokens to themselves."""

from __future__ import annotations

import random

import pytest

from stemcache.prefixtree.errors import CapacityError, StoreError
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.store import PrefixStore

SPACE = Namespace.of(model="m", dtype="float32")


def make_store(n_chunks: int) -> tuple[PrefixStore, list[tuple[int, int, int]]]:
    copies: list[tuple[int, int, int]] = []
    return PrefixStore(n_chunks, 16, lambda *copy: copies.append(copy)), copies


def test_only_chunks_that_lie_wholly_before_are_published() -> None:
    rng = random.Random(0)
    for _ in range(200):
        store, copies = make_store(40)
        tokens = [rng.randrange(3) for _ in range(rng.randint(1, 200))]
        cached, private = sorted(rng.sample(range(len(tokens) + 1), 2)) if len(tokens) > 1 else (0, 0)
        with store.acquire([], SPACE) as first:
            first.reserve(cached)
            first.commit(tokens[:cached])
        with store.acquire(tokens[:cached], SPACE) as lease:
            lease.reserve(len(tokens))
            lease.keep_private(private)
            lease.claim(tokens)
            done = lease.cached_tokens
            while done < len(tokens):
                done = min(len(tokens), done + rng.randint(1, 40))
                lease.commit(tokens[:done])
                store.check()
                assert store.stats().claims == (done // 16 < private // 16), "nothing is announced that will not come"
            at = rng.randint(0, len(tokens))
            copies.clear()
            with lease.fork(at) as fork:
                store.check()
                own = fork.private_slots
                assert len(own) == -(-at // 16) - min(at, private) // 16
                assert not set(own) & set(lease.slots)
                assert [target for _, target, _ in copies] == own, "what is not published is copied"
                assert sum(count for *_, count in copies) == at - min(at, private) // 16 * 16
                fork.reserve(at + 40)
                fork.commit(tokens[:at] + [7] * 40)
                assert store.match_tokens(tokens[:at] + [7] * 40, SPACE) <= max(private, cached)
        store.check()
        assert store.match_tokens(tokens, SPACE) == max(private, cached) // 16 * 16
        assert store.stats().private_chunks == 0


def test_what_is_published_cannot_be_kept_private() -> None:
    store, _ = make_store(4)
    with store.acquire([], SPACE) as lease:
        lease.reserve(20)
        lease.commit([1] * 20)
        with pytest.raises(ValueError, match="16 tokens are published"):
            lease.keep_private(15)
        lease.keep_private(18)
        lease.keep_private(30)  # no further than before
        lease.reserve(40)
        lease.commit([1] * 40)
        assert store.stats().cached_chunks == 1
    with pytest.raises(StoreError):
        lease.keep_private(0)


def test_a_fork_without_room_leaves_nothing_behind() -> None:
    store, _ = make_store(4)
    with store.acquire([], SPACE) as lease:
        lease.reserve(48)
        lease.keep_private(0)
        lease.commit([1] * 48)
        with pytest.raises(CapacityError):
            lease.fork(48)
        store.check()
        assert store.stats().free_chunks == 1
