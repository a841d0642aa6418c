"""Eviction policies and the order of requests on a running engine: the answers stay, what is kept changes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import pytest

from stemcache import Engine, SamplingParams
from stemcache.engine.cost import CostSurface
from stemcache.engine.policies import EVICTIONS, eviction_policy, history_for
from stemcache.prefixtree.expected import Expected

ONE = SamplingParams(max_tokens=1, temperature=0)
CHUNK = 16


def digest_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def document(number: int, n_tokens: int = 4 * CHUNK) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(90) for _ in range(n_tokens)]


def small_pool(engine_maker: Callable[..., Engine], n_chunks: int, **options: Any) -> Engine:
    """An engine whose pool has about so many chunks."""
    probe = engine_maker(pool_bytes=1 << 20)
    chunk_bytes = (1 << 20) // probe.stats().store.total_chunks
    return engine_maker(pool_bytes=n_chunks * chunk_bytes, **options)


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("queue", ["fcfs", "cache"])
def test_answers_do_not_depend_on_what_is_evicted(
    llama_engine: Callable[..., Engine], eviction: str, queue: str
) -> None:
    rng = random.Random(1)
    prompts = [document(rng.randrange(6)) + document(100 + rng.randrange(9), 9) for _ in range(30)]
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    expected = [c.token_ids for c in llama_engine(pool_bytes=4 << 20).generate(prompts, params)]
    engine = small_pool(llama_engine, 14, eviction=eviction, queue=queue)
    assert [c.token_ids for c in engine.generate(prompts, params)] == expected
    assert engine.stats().store.evicted_chunks > 0
    engine.check()


@pytest.mark.parametrize(("eviction", "kept"), [("lru", False), ("lfu", True), ("pgdsf", True)])
def test_a_document_that_is_asked_for_often_survives_a_scan(
    llama_engine: Callable[..., Engine], eviction: str, kept: bool
) -> None:
    engine = small_pool(llama_engine, 24, eviction=eviction)
    for _ in range(3):
        list(engine.generate([[*document(0), 1]], ONE))
    for number in range(1, 12):
        list(engine.generate([[*document(number), 1]], ONE))
    assert (engine.cache.cached_tokens(document(0)) == 4 * CHUNK) is kept


@pytest.mark.parametrize("known", [1, 2])
def test_what_is_expected_reaches_the_policy(llama_engine: Callable[..., Engine], known: int) -> None:
    """Of two documents that were read once each, the one stays that was asked for elsewhere."""
    engine = small_pool(llama_engine, 12)
    for number in (1, 2):
        expected = Expected([(4 * CHUNK, 8.0)] if number == known else [])
        list(engine.submit([*document(number), 1], ONE, expected=expected))
    list(engine.submit([*document(3), 1], ONE))
    assert [engine.cache.cached_tokens(document(number)) == 4 * CHUNK for number in (1, 2)] == [known == 1, known == 2]


def test_the_engine_learns_what_its_steps_cost(llama_engine: Callable[..., Engine]) -> None:
    engine = llama_engine()
    assert engine.cost.observed == 0
    list(engine.generate([document(1, 200)], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)))
    assert engine.cost.observed == 5
    assert engine.cost.seconds(0, 200) > 0


def test_the_queue_by_cache_starts_what_is_cached_first(llama_engine: Callable[..., Engine]) -> None:
    """One runs at a time; all three arrive between two steps."""
    for queue, expected in (("fcfs", [1, 2, 0]), ("cache", [0, 1, 2])):
        engine = llama_engine(queue=queue, max_running=1)
        list(engine.generate([[*document(0), 1]], ONE))
        streams = engine._loop.call(lambda e=engine: {n: e.submit([*document(n), 2], ONE) for n in (1, 2, 0)})
        for stream in streams.values():
            list(stream)
        started = {number: stream.timing.started for number, stream in streams.items()}
        assert sorted(started, key=started.__getitem__) == expected


def test_the_history_takes_no_stranger_for_a_friend() -> None:
    """After many pools' worth of chunks that came once each, hardly a new one seems known."""
    n_chunks = 50
    history = history_for(n_chunks)
    for stranger in range(100 * n_chunks):
        history.add(digest_of(f"stranger {stranger}"))
    known = sum(history.estimate(digest_of(f"newcomer {newcomer}")) > 0.1 for newcomer in range(1_000))
    assert known < 20


def test_unknown_names_are_refused(llama_engine: Callable[..., Engine]) -> None:
    with pytest.raises(ValueError, match="eviction must be one of lru, lfu, pgdsf, not 'fifo'"):
        eviction_policy("fifo", 10, 16, CostSurface())
    with pytest.raises(ValueError, match="queue must be one of fcfs, cache, not 'lifo'"):
        llama_engine(queue="lifo")
