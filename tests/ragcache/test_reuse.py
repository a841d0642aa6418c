"""Reuse by document, against what `explain` says of each prompt before it is sent, on random questions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from random import Random

import pytest

from stemcache import SamplingParams
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import SYSTEM_PROMPT, FactDocument, random_corpus
from stemcache.engine.engine import Engine
from stemcache.prefixtree.explain import Reason
from stemcache.ragcache.calibration import Verdict
from stemcache.ragcache.context_cache import ContextCache
from stemcache.ragcache.documents import Document
from stemcache.ragcache.preparation import Prepared, Space, Wish
from stemcache.ragcache.reuse import MAX_DOCUMENTS, Reuse

BRIEF = SamplingParams(max_tokens=2, temperature=0)


def corpus(seed: int, n: int) -> tuple[list[FactDocument], list[Document]]:
    facts = random_corpus(Random(seed), n)
    return facts, [Document(id=each.title, title=each.title, text=each.text) for each in facts]


@pytest.fixture(scope="module")
def tight() -> Iterator[Engine]:
    """An engine that has room for two or three prompts."""
    with Engine.load(MODEL_PATH, dtype="float32", pool_bytes=2 << 20, chunk_tokens=16) as engine:
        yield engine
        engine.check()


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_the_explanations(tight: Engine, seed: int) -> None:
    rng, (facts, documents) = Random(seed), corpus(100 + seed, 8)
    spaces = [Space("one", b"one"), Space("one", b"one", b"salt"), Space("two", b"two")]
    expected: defaultdict[tuple[Space, str], Counter[str]] = defaultdict(Counter)
    prompts = []
    with ContextCache(tight, system_prompt=SYSTEM_PROMPT, passage_tokens=60) as cache:
        for space in (spaces[0], spaces[2]):
            cache.add(documents, space=space)
        for _ in range(25):
            space, question = rng.choice(spaces), rng.choice(rng.choice(facts).facts).question
            wish = Wish(k=rng.randint(1, 3), order=rng.choice(["relevance", "cache"]), explain=True)
            prepared = cache.prepare(messages(question), question, wish, space=space)
            assert prepared.explanation is not None
            with tight.submit(prepared.tokens, BRIEF, tenant=space.tenant, cache_salt=space.cache_salt) as stream:
                list(stream)
            cache.started(prepared, stream.usage)
            prompts.append(prepared)
            seen = set()
            # A request does not look its last token up, so a chunk that it completes is not whole yet.
            whole = (len(prepared.tokens) - 1) // tight.chunk_tokens * tight.chunk_tokens
            for each, (start, stop) in zip(prepared.retrieved, prepared.context.spans, strict=True):
                told = expected[space, each.passage.document_id]
                told["requests"] += each.passage.document_id not in seen
                seen.add(each.passage.document_id)
                told["all"] += stop - start
                for part in prepared.explanation.ranges:
                    last = min(stop, part.stop, whole if part.reason is Reason.EVICTED else stop)
                    overlap = max(0, last - max(start, part.start))
                    told["hit" if part.reason.is_hit else part.reason] += overlap
        for space in spaces:
            found = {each.document_id: each for each in cache.reuse(space=space)}
            assert set(found) == {name for where, name in expected if where == space}
            for name, each in found.items():
                told = expected[space, name]
                assert (each.requests, each.hit_tokens) == (told["requests"], told["hit"])
                assert each.evicted_tokens == told[Reason.EVICTED]
                assert each.hit_tokens + each.miss_tokens == told["all"]
                assert each.cached_tokens == cached_now(tight, space, prompts, name)
        assert sum(told[Reason.EVICTED] for told in expected.values()) > 0, "the pool is large enough to prove nothing"
        assert sum(told["hit"] for told in expected.values()) > 0


def cached_now(engine: Engine, space: Space, prompts: list[Prepared], name: str) -> int:
    """The document's cached tokens, looked up in every prompt in which it stood; once where prompts begin alike."""
    places = {}
    for prepared in prompts:
        for each, (start, stop) in zip(prepared.retrieved, prepared.context.spans, strict=True):
            if prepared.space == space and each.passage.document_id == name:
                places[tuple(prepared.tokens[:stop])] = start
    found = {
        prompt: engine.cache.cached_tokens(prompt, tenant=space.tenant, cache_salt=space.cache_salt)
        for prompt in places
    }
    return sum(max(0, found[prompt] - start) for prompt, start in places.items())


def test_what_is_moved_is_told_apart(engine: Engine, cache_of) -> None:
    cache, (facts, documents), rng = cache_of(), corpus(6, 5), Random(6)
    cache.blending.verdict = Verdict(
        share=0.15, questions=100, right_computed=100, right_moved=100, prompt_tokens=1000, moved_tokens=600
    )
    cache.add(documents)
    expected: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for _ in range(8):
        question = rng.choice(rng.choice(facts).facts).question
        answer = cache.ask(question, rng.randint(2, 4), params=BRIEF, reuse=rng.choice(["prefix", "blend", "blend"]))
        for source in answer.sources:
            expected[source.document_id] += Counter(
                requests=1, hits=source.cached_tokens, moved=source.moved_tokens, missed=source.computed_tokens
            )
    told = {each.document_id: each for each in cache.reuse()}
    assert {
        name: Counter(requests=each.requests, hits=each.hit_tokens, moved=each.moved_tokens, missed=each.miss_tokens)
        for name, each in told.items()
    } == expected
    assert sum(each.moved_tokens for each in told.values()) > 0
    for each in told.values():
        assert each.cached_tokens >= each.tokens or not each.moved_tokens, "it was read alone, and that is cached"


def test_what_is_deleted_or_changed_is_no_longer_told(engine: Engine, cache_of) -> None:
    cache, (facts, documents) = cache_of(), corpus(7, 3)
    cache.add(documents)
    for _ in range(2):
        cache.ask(facts[0].facts[0].question, 3, params=BRIEF)
    before = {each.document_id: each for each in cache.reuse()}
    assert set(before) == {document.id for document in documents}
    assert all(each.requests == 2 and 0 < each.cached_tokens <= each.tokens for each in before.values())
    assert [each.document_id for each in cache.reuse(1)] == [each.document_id for each in cache.reuse()][:1]
    cache.delete(documents[0].id)
    cache.update(documents[1].id, text="Something else.")
    after = {each.document_id: each for each in cache.reuse()}
    assert set(after) == {documents[1].id, documents[2].id}
    assert not cache._reuse._places, "they hold the tokens of what is deleted"
    assert after[documents[1].id].cached_tokens == 0
    cache.ask("Something else?", 2, params=BRIEF)
    changed = next(each for each in cache.reuse() if each.document_id == documents[1].id)
    assert (changed.requests, changed.tokens) == (3, changed.tokens)
    assert changed.tokens < before[documents[1].id].tokens
    assert changed.cached_tokens <= changed.tokens


def test_a_document_whose_time_is_over_is_not_told(engine: Engine, cache_of) -> None:
    now = [1000.0]
    cache, (facts, documents) = cache_of(clock=lambda: now[0]), corpus(8, 1)
    cache.add([Document(id="short", text=documents[0].text, expires_at=1010.0)])
    cache.ask(facts[0].facts[0].question, 1, params=BRIEF)
    assert [each.document_id for each in cache.reuse()] == ["short"]
    now[0] = 1020.0
    cache.expire()
    assert cache.reuse() == []


def test_what_was_not_used_for_longest_goes(engine: Engine, cache_of, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_DOCUMENTS > 2
    monkeypatch.setattr("stemcache.ragcache.reuse.MAX_DOCUMENTS", 2)
    cache, (_, documents) = cache_of(), corpus(9, 4)
    cache.add(documents)
    reuse = Reuse(engine.cache)
    for document in documents:
        prepared = cache.prepare_given(messages("Who?"), [(document.title, document.text)])
        with engine.submit(prepared.tokens, BRIEF) as stream:
            list(stream)
        reuse.count(prepared, stream.usage)
    assert [each.document_id for each in reuse.of(Space(), 10)] == [documents[3].id, documents[2].id]
