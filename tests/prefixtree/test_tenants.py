"""Tenants share nothing: one's hits and slots are as if the others were not there."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.store import PrefixStore

CHUNK = 4
TENANTS = [b"", b"a", b"b"]
SALTS = [b"", b"a"]

tokens = st.lists(st.integers(0, 1), min_size=1, max_size=16)  # two tokens only, so that most prompts collide
visits = st.lists(st.tuples(st.sampled_from(TENANTS), st.sampled_from(SALTS), tokens), max_size=40)


def namespace(tenant: bytes, salt: bytes) -> Namespace:
    return Namespace.of(model="m", dtype="float32", tenant=tenant, salt=salt)


def copying(log):
    return lambda source, target, count: log.append((source, target))


def visit(store, where, prompt):
    """Read a prompt and leave it cached; returns how much was cached before, and the slots that were used."""
    with store.acquire(prompt, where) as lease:
        cached = lease.cached_tokens
        lease.reserve(len(prompt))
        lease.commit(prompt)
        return cached, list(lease.slots)


@settings(max_examples=100)
@given(visits)
def test_hits_are_those_of_a_store_of_ones_own(history):
    shared = PrefixStore(1000, CHUNK, copying([]))
    own = {(t, s): PrefixStore(1000, CHUNK, copying([])) for t in TENANTS for s in SALTS}
    for tenant, salt, prompt in history:
        cached, _ = visit(shared, namespace(tenant, salt), prompt)
        assert cached == visit(own[tenant, salt], namespace(tenant, salt), prompt)[0]
    shared.check()


@settings(max_examples=100)
@given(visits)
def test_no_slot_is_ever_seen_or_copied_by_two(history):
    """In a store that never evicts, a slot that one tenant's chunk was published in is that tenant's for good."""
    copies, owner = [], {}
    store = PrefixStore(1000, CHUNK, copying(copies))
    for tenant, salt, prompt in history:
        where = namespace(tenant, salt)
        _, slots = visit(store, where, prompt)
        for slot in slots[: len(prompt) // CHUNK]:
            assert owner.setdefault(slot, where) == where
        assert all(owner[source] == where for source, _ in copies)
        copies.clear()
