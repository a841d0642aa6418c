"""Forgetting: nothing computed from a document stays, whoever uses it, and no answer changes. Chunks have 16 tokens."""

from __future__ import annotations

from random import Random

import pytest

from stemcache import SamplingParams
from stemcache.prefixtree.footprint import Footprint
from stemcache.prefixtree.tokens import decode_tokens

ONE = SamplingParams(max_tokens=1, temperature=0)
SYSTEM = [3 + i % 40 for i in range(21)]
DOCUMENTS = [[50 + (7 * d + i * (d + 1)) % 70 for i in range(18 + 5 * d)] for d in range(5)]


def prompt_of(ids, question=(5, 6)):
    return SYSTEM + [token for d in ids for token in DOCUMENTS[d]] + list(question)


def footprints_of(engine, ids, wanted, tenant=b""):
    """Where `wanted` begins in the prompt of `ids`."""
    start = len(SYSTEM) + sum(len(DOCUMENTS[d]) for d in ids[: ids.index(wanted)])
    return engine.cache.footprint(prompt_of(ids), start, start + len(DOCUMENTS[wanted]), tenant=tenant)


def ask(engine, prompt, tenant=b"", n=1):
    with engine.submit(prompt, SamplingParams(max_tokens=n, temperature=0, ignore_eos=True), tenant=tenant) as stream:
        tokens = [token for delta in stream for token in delta.token_ids]
    return tokens, stream.usage.cached_tokens


def holds(text, part):
    return any(text[at : at + len(part)] == part for at in range(len(text) - len(part) + 1))


def cached_paths(engine):
    """The tokens from the root to each cached chunk, of all namespaces."""
    tree = engine._loop.store._ledger.tree
    nodes = [node for node in tree.nodes() if node.parent is not None]
    return [decode_tokens(b"".join(reversed([each.key for each in node.upward()]))) for node in nodes]


def used_slots(engine):
    tree = engine._loop.store._ledger.tree
    return {node.slot for node in tree.nodes() if node.parent is not None}


def dirty_slots(engine):
    """The slots that hold something."""
    pool = engine._runner.pool.tensor
    return {slot for slot in range(pool.shape[3]) if pool[:, :, :, slot].any()}


def test_what_precedes_a_document_stays_and_what_follows_goes(llama_engine):
    engine = llama_engine()
    ask(engine, prompt_of([0, 1, 2]))
    ask(engine, prompt_of([0, 2]))
    done = engine.cache.forget([footprints_of(engine, [0, 1, 2], 1)])
    assert done.chunks > 0
    assert (done.restarted_requests, done.ended_pins) == (0, 0)
    start = len(SYSTEM) + len(DOCUMENTS[0])
    assert engine.cache.cached_tokens(prompt_of([0, 1, 2])) == start
    assert engine.cache.cached_tokens(prompt_of([0, 2])) > start
    assert engine.cache.forget([footprints_of(engine, [0, 1, 2], 1)]).chunks == 0, "there is nothing left"
    assert engine.cache.forget([]).chunks == 0


def test_slots_are_overwritten(llama_engine):
    engine = llama_engine()
    ask(engine, prompt_of([0]), n=40)
    engine.cache.forget([footprints_of(engine, [0], 0)])
    engine.cache.stats()
    assert used_slots(engine) <= dirty_slots(engine)
    assert len(used_slots(engine)) == 1  # of the system prompt
    # What is left beside it is the request's own last chunk, which was less than full and never found by anybody.
    assert len(dirty_slots(engine) - used_slots(engine)) <= 1


def test_a_last_chunk_that_only_the_answer_filled_goes_too(llama_engine):
    """The document ends in a chunk that the prompt does not fill: its digest depends on what was generated."""
    engine = llama_engine()
    prompt = prompt_of([0], question=[9])
    assert len(prompt) % 16
    ask(engine, prompt, n=30)
    mark = footprints_of(engine, [0], 0)
    assert engine.cache.held([mark]) == {mark}
    engine.cache.forget([mark])
    assert engine.cache.held([mark]) == set()
    assert not any(holds(path, DOCUMENTS[0][:11]) for path in cached_paths(engine))


def test_another_tenants_copy_stays(llama_engine):
    engine = llama_engine()
    for tenant in (b"a", b"b"):
        ask(engine, prompt_of([1]), tenant=tenant)
    engine.cache.forget([footprints_of(engine, [1], 1, tenant=b"a")])
    assert engine.cache.cached_tokens(prompt_of([1]), tenant=b"a") == 16, "the whole chunk before the document"
    assert engine.cache.cached_tokens(prompt_of([1]), tenant=b"b") > len(SYSTEM)


def test_pins_on_it_end_and_others_stay(llama_engine):
    engine = llama_engine()
    ask(engine, prompt_of([0, 1]))
    engine.cache.pin(prompt_of([0, 1]))
    kept = engine.cache.pin(SYSTEM)
    done = engine.cache.forget([footprints_of(engine, [0, 1], 1)])
    assert done.ended_pins == 1
    assert engine.cache.pins() == [kept]
    assert engine.cache.unpin(kept.id)


@pytest.mark.parametrize("n", [1, 3])
def test_a_running_request_answers_the_same_and_leaves_nothing(llama_engine, models, n):
    engine, reference = llama_engine(max_step_tokens=16), models("llama")[1]
    prompt = prompt_of([0, 1, 2])
    mark = footprints_of(engine, [0, 1, 2], 1)
    with engine.submit(prompt, SamplingParams(max_tokens=60, n=n, temperature=0, ignore_eos=True)) as stream:
        told: dict[int, list[int]] = {index: [] for index in range(n)}
        restarted = 0
        for at, delta in enumerate(stream):
            told[delta.index] += delta.token_ids
            if at in (4, 30):
                restarted += engine.cache.forget([mark]).restarted_requests
    assert restarted == 1, "the second time it is out of sight already"
    assert set(map(tuple, told.values())) == {tuple(reference.continuation(prompt, 60))}
    assert engine.stats().running == 0  # the engine has gone through its inbox, and so through its sweep
    assert not any(holds(path, DOCUMENTS[1]) for path in cached_paths(engine))
    assert not engine._loop.forgetting._isolated


def test_a_waiting_request_leaves_nothing_either(llama_engine, models):
    """It has not been read at all when its document goes."""
    engine, reference = llama_engine(max_running=1), models("llama")[1]
    first, second = prompt_of([3]), prompt_of([1, 2])
    with engine.submit(first, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)) as stream:
        iterator = iter(stream)
        next(iterator)
        with engine.submit(second, SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)) as waiting:
            assert engine.cache.forget([footprints_of(engine, [1, 2], 1)]).restarted_requests == 1
            list(iterator)
            answer = [token for delta in waiting for token in delta.token_ids]
    assert answer == reference.continuation(second, 5)
    engine.stats()
    assert not any(holds(path, DOCUMENTS[1]) for path in cached_paths(engine))


def test_a_cancelled_request_that_was_restarted_leaves_nothing(llama_engine):
    engine = llama_engine()
    with engine.submit(prompt_of([1]), SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)) as stream:
        next(iter(stream))
        assert engine.cache.forget([footprints_of(engine, [1], 1)]).restarted_requests == 1
    engine.stats()
    engine.stats()
    assert not any(holds(path, DOCUMENTS[1]) for path in cached_paths(engine))


@pytest.mark.parametrize("seed", range(2))
def test_random_workloads(llama_engine, models, seed):
    """Requests over random documents, forgotten at random moments, in a pool that evicts and preempts."""
    random, reference = Random(seed), models("llama")[1]
    engine = llama_engine(pool_bytes=1 << 17, max_step_tokens=32)
    marks: dict[int, set[Footprint]] = {d: set() for d in range(5)}
    live = []
    for _ in range(20):
        ids = random.sample(range(5), random.randint(1, 3))
        prompt = prompt_of(ids, question=random.choices(range(3, 90), k=random.randint(1, 8)))
        for d in ids:
            marks[d].add(footprints_of(engine, ids, d))
        params = SamplingParams(max_tokens=random.randint(1, 12), n=random.choice([1, 1, 2]), temperature=0)
        live.append((ids, prompt, params, engine.submit(prompt, params)))
        if random.random() < 0.4:
            gone = random.randrange(5)
            engine.cache.forget(marks[gone])
            assert engine.cache.held(marks[gone]) == set()
            assert not any(holds(path, DOCUMENTS[gone]) for path in visible_paths(engine))
            engine.check()
    for _, prompt, params, stream in live:
        told = {}
        for delta in stream:
            told.setdefault(delta.index, []).extend(delta.token_ids)
        for tokens in told.values():
            assert tokens == reference.continuation(prompt, params.max_tokens)[: len(tokens)]
            assert len(tokens) == params.max_tokens or tokens[-1] == 2
    for d in range(5):
        engine.cache.forget(marks[d])
    engine.stats()
    assert not any(holds(path, DOCUMENTS[d][:16]) for d in range(5) for path in cached_paths(engine))


def visible_paths(engine):
    """`cached_paths` of what requests can find: without the namespaces of requests that began anew."""
    loop = engine._loop

    def look():
        hidden = {request.namespace.digest for request in loop.forgetting._isolated}
        tree = loop.store._ledger.tree
        nodes = [node for node in tree.nodes() if node.parent is not None and node.root.key not in hidden]
        return [decode_tokens(b"".join(reversed([each.key for each in node.upward()]))) for node in nodes]

    return loop.call(look)
