"""Pins by themselves: their share of the pool, their time, and that they give way. Chunks have 4 tokens; no model."""

from __future__ import annotations

import pytest

from stemcache.engine import pins as pins_module
from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.pins import Pins
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.store import PrefixStore

MINE, YOURS = (Namespace.of(model="m", dtype="float32", tenant=tenant) for tenant in ("mine", "yours"))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store() -> PrefixStore:
    return PrefixStore(8, 4, lambda source, target, n: None)


def cache(store: PrefixStore, tokens: range, namespace: Namespace = MINE) -> range:
    with store.acquire(tokens, namespace) as lease:
        lease.reserve(len(tokens))
        lease.commit(tokens)
    return tokens


def test_a_pinned_prefix_outlives_a_full_pool(store: PrefixStore) -> None:
    pins = Pins(store)
    pin = pins.add(cache(store, range(10)), MINE, None)
    assert (pin.tokens, pin.expires_in) == (8, None)
    for start in range(100, 200, 10):
        cache(store, range(start, start + 10))
    assert store.match_tokens(range(10), MINE) == 8
    assert store.clear(MINE) > 0
    assert store.match_tokens(range(10), MINE) == 8
    assert pins.remove(pin.id, MINE)
    assert store.clear(MINE) == 2
    store.check()


def test_a_pin_ends_with_its_time(store: PrefixStore) -> None:
    clock = Clock()
    pins = Pins(store, clock=clock)
    cache(store, range(8))
    short, long = pins.add(range(4), MINE, 5.0), pins.add(range(8), MINE, 9.0)
    clock.now += 4.0
    assert [(pin.id, pin.expires_in) for pin in pins.of(MINE)] == [(short.id, 1.0), (long.id, 5.0)]
    clock.now += 1.0
    assert [pin.id for pin in pins.of(MINE)] == [long.id]
    assert not pins.remove(short.id, MINE)
    clock.now += 4.0
    pins.expire()
    assert store.stats().leases == len(pins) == 0


def test_pins_hold_half_of_the_pool_and_shared_chunks_count_once(store: PrefixStore) -> None:
    pins = Pins(store)
    cache(store, range(12))
    pins.add(range(12), MINE, None)
    pins.add(range(8), MINE, None)
    pins.require_room([0, 1, 2, 3, 9, 9, 9, 9], MINE)  # one chunk more
    with pytest.raises(InvalidRequestError, match=r"needs 2 chunks; pins may hold 4 .* hold 3 already") as refused:
        pins.require_room(range(50, 58), MINE)
    assert refused.value.code == "pin_limit_exceeded"
    with pytest.raises(InvalidRequestError, match="needs 2 chunks"):
        pins.add(range(8), YOURS, None)  # the same tokens are other chunks there
    assert len(pins) == 2
    store.check()


def test_less_than_a_chunk_cannot_be_pinned(store: PrefixStore) -> None:
    with pytest.raises(InvalidRequestError, match="nothing to pin: the prompt has 3 tokens"):
        Pins(store).add(range(3), MINE, None)
    assert store.stats().leases == 0


def test_the_number_of_pins_is_bounded(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins_module, "MAX_PINS", 3)
    pins = Pins(store)
    cache(store, range(4))
    for _ in range(3):
        pins.add(range(4), MINE, None)
    with pytest.raises(InvalidRequestError, match="there are 3 pins already"):
        pins.add(range(4), MINE, None)


def test_pins_are_their_tenants(store: PrefixStore) -> None:
    pins = Pins(store)
    pin = pins.add(cache(store, range(4)), MINE, None)
    assert pins.of(YOURS) == []
    assert not pins.remove(pin.id, YOURS)
    assert [each.id for each in pins.of(MINE)] == [pin.id]


def test_the_oldest_gives_way_first(store: PrefixStore) -> None:
    pins = Pins(store)
    cache(store, range(8))
    pins.add(range(8), MINE, None)
    second = pins.add(range(4), MINE, 1e6)
    assert pins.give_way()
    assert [pin.id for pin in pins.of(MINE)] == [second.id]
    pins.clear()
    assert not pins.give_way()
    assert store.stats().leases == 0
