"""The engine's cache as its owner sees and changes it. Chunks have 16 tokens; after each test nothing leaks."""

from __future__ import annotations

from random import Random

import pytest

from stemcache import Engine, SamplingParams
from stemcache.engine.errors import EngineClosedError, InvalidRequestError
from stemcache.engine.salts import MAX_SALTS, MAX_TENANTS, Salts
from stemcache.prefixtree.explain import Reason

ONE = SamplingParams(max_tokens=1, temperature=0)
PREFIX = [7 + i % 50 for i in range(80)]  # five chunks


def cached_tokens(engine, prompt, tenant=b""):
    with engine.submit(prompt, ONE, tenant=tenant) as stream:
        list(stream)
    return stream.usage.cached_tokens


def pool_of(engine):
    return engine.cache.stats().store.total_chunks


def test_explain_foretells_what_a_request_finds(llama_engine):
    """Random prompts that share beginnings, in a pool that turns over."""
    engine, random = llama_engine(pool_bytes=1 << 16), Random(5)
    assert pool_of(engine) < 40
    texts = [[random.randrange(60) for _ in range(90)] for _ in range(6)]
    reasons = set()
    for _ in range(60):
        prompt = random.choice(texts)[: random.randint(1, 90)] + random.choices(range(60), k=random.randrange(4))
        explained = engine.explain(prompt)
        reasons |= {each.reason for each in explained.ranges}
        assert sum(each.tokens for each in explained.ranges) == len(prompt)
        assert cached_tokens(engine, prompt) == explained.hit_tokens
    assert reasons >= {Reason.HIT, Reason.PARTIAL_CHUNK, Reason.EVICTED, Reason.NEVER_SEEN, Reason.LAST_TOKEN}


def test_a_prompt_that_is_being_computed_is_pending(llama_engine):
    engine, told = llama_engine(max_step_tokens=16), []
    run = engine._runner.run

    def looking(step):
        logits = run(step)
        if not told:  # on the engine's thread, in the middle of the first step
            engine._loop._inbox.put(lambda: told.append(engine._loop.store.explain(PREFIX, engine.namespace(b""))))
        return logits

    engine._runner.run = looking
    cached_tokens(engine, PREFIX)
    assert [(each.tokens, each.reason) for each in told[0].ranges] == [(16, Reason.HIT), (64, Reason.PENDING)]


def test_another_tenant_sees_nothing(llama_engine):
    engine = llama_engine()
    cached_tokens(engine, PREFIX, tenant=b"a")
    pin = engine.cache.pin(PREFIX, tenant=b"a")
    explained = engine.explain(PREFIX, tenant=b"b")
    assert explained.tokens_of(Reason.NEVER_SEEN) == 79
    assert explained.divergence is None
    assert engine.cache.tree(100, tenant=b"b").branches == ()
    own = engine.cache.stats(tenant=b"b")
    assert (own.own.cached_chunks, own.own.acquires, own.pins) == (0, 0, ())
    assert engine.cache.clear(tenant=b"b") == 0
    assert not engine.cache.unpin(pin.id, tenant=b"b")
    assert engine.cache.unpin(pin.id, tenant=b"a")
    assert engine.cache.clear(tenant=b"a") == 5


def test_an_explanation_names_the_tenants_own_salts_only(llama_engine):
    engine = llama_engine()
    for tenant, salt in ((b"a", b"x"), (b"b", b"")):
        with engine.submit(PREFIX, ONE, tenant=tenant, cache_salt=salt) as stream:
            list(stream)
    for salt, reason in ((b"x", Reason.HIT), (b"", Reason.OTHER_NAMESPACE), (b"y", Reason.OTHER_NAMESPACE)):
        assert engine.explain(PREFIX, tenant=b"a", cache_salt=salt).tokens_of(reason) >= 64
    assert engine.explain(PREFIX, tenant=b"b", cache_salt=b"x").tokens_of(Reason.OTHER_NAMESPACE) >= 64
    assert engine.explain(PREFIX, tenant=b"c").tokens_of(Reason.NEVER_SEEN) == 79
    assert engine.cache.clear(tenant=b"a") == 0
    assert engine.cache.clear(tenant=b"a", cache_salt=b"x") == 5


def test_the_memory_of_salts_is_bounded():
    salts = Salts()
    for i in range(2 * MAX_SALTS):
        salts.note(b"one", b"%d" % (i // 2))
    assert salts.of(b"one") == [b"%d" % i for i in range(MAX_SALTS)]
    salts.note(b"one", b"more")
    assert salts.of(b"one")[-1] == b"more"
    assert b"0" not in salts.of(b"one")
    for i in range(MAX_TENANTS):
        salts.note(b"%d" % i, b"")
    assert salts.of(b"one") == []


def test_the_tree_shows_who_shares(llama_engine):
    engine = llama_engine()
    cached_tokens(engine, PREFIX)
    cached_tokens(engine, PREFIX[:32] + [1] * 16)
    pin = engine.cache.pin(PREFIX)
    tree = engine.cache.tree(100, with_tokens=True)
    assert {each.token_ids: (each.parent, each.chunks, each.sharers) for each in tree.branches} == {
        tuple(PREFIX[:32]): (None, 2, 1),
        tuple(PREFIX[32:]): (tree.branches[0].id, 3, 1),
        (1,) * 16: (tree.branches[0].id, 1, 0),
    }
    engine.cache.unpin(pin.id)


def test_a_pin_gives_way_to_a_request_that_could_not_run(llama_engine):
    engine = llama_engine(pool_bytes=1 << 16)
    chunks = pool_of(engine)
    pinned = [i % 50 for i in range(16 * (chunks // 2))]
    cached_tokens(engine, pinned)
    pin = engine.cache.pin(pinned)
    assert pin.tokens == len(pinned)
    with pytest.raises(InvalidRequestError, match="remove a pin, pin less"):
        engine.cache.require_pin_room([9] * 32)
    assert cached_tokens(engine, [3] * 100) == 0
    assert engine.cache.pins() == [pin], "a request that fits beside it leaves it alone"
    large = [4 + i % 40 for i in range(engine.max_model_len - 1)]
    assert len(large) > 16 * (chunks - chunks // 2)
    cached_tokens(engine, large)
    assert engine.cache.pins() == []
    engine.check()


def test_a_pin_ends_though_the_engine_is_idle(llama_engine):
    engine = llama_engine()
    cached_tokens(engine, PREFIX)
    engine.cache.pin(PREFIX, seconds=1e-9)
    assert engine.stats().store.leases == 0


def test_a_closed_engine_says_so_and_holds_no_pin(models):
    engine = Engine.from_model(models("llama")[0], pool_bytes=1 << 20, chunk_tokens=16)
    cached_tokens(engine, PREFIX)
    engine.cache.pin(PREFIX)
    assert engine.stats().store.leases == 1
    engine.close()
    engine._loop.store.check()
    assert engine._loop.store.stats().leases == 0
    for ask in (engine.cache.stats, lambda: engine.explain(PREFIX), engine.cache.clear):
        with pytest.raises(EngineClosedError):
            ask()


def test_prompts_that_are_none(llama_engine):
    engine = llama_engine()
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        engine.explain([])
    with pytest.raises(InvalidRequestError, match="token ids must be integers"):
        engine.explain([engine.vocab_size])
