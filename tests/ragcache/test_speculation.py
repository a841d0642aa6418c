"""Speculation on the demo model: it changes no answer, whatever the stages of a search say, and leaves nothing behind.

The gate stands open here, so that guesses are made whatever searches take.
"""

from __future__ import annotations

import threading
from random import Random

import pytest

from stemcache import SamplingParams
from stemcache.engine.demo.facts import random_corpus
from stemcache.prefixtree.errors import StemcacheError
from stemcache.prefixtree.tokens import decode_tokens
from stemcache.ragcache.documents import Document
from stemcache.ragcache.errors import CatalogueError, NoDocumentsError
from stemcache.ragcache.gate import Gate
from stemcache.ragcache.index import FlatIndex, HNSWIndex
from stemcache.ragcache.preparation import Space, Wish

BRIEF = SamplingParams(max_tokens=6, temperature=0)
HERE = Space()


class Doubtful(FlatIndex):
    """A flat index whose stages are wrong at first, in the ways that `plan` names, or in random ones."""

    def __init__(self, dimensions, random, plan=None):
        super().__init__(dimensions)
        self.random, self.plan = random, plan

    def stages(self, vector, k, allowed=None):
        found = self.search(vector, k, allowed)
        ways = ("right", "right", "order", "fewer", "others", "none")
        for way in self.plan or self.random.choices(ways, k=self.random.randint(0, 3)):
            match way:
                case "right":
                    yield found
                case "order":
                    yield self.random.sample(found, len(found))
                case "fewer":
                    yield found[:-1]
                case "others":
                    yield self.random.sample(self.search(vector, 4 * k, allowed), min(k, len(found)))
                case _:
                    yield []
        yield found


@pytest.fixture
def open_gate(monkeypatch):
    monkeypatch.setattr(Gate, "wants_stages", lambda self: True)
    monkeypatch.setattr(Gate, "step_tokens", lambda self, stage: 64)


def corpus(seed, n):
    facts = random_corpus(Random(seed), n)
    return facts, [Document(id=f.title, title=f.title, text=f.text, metadata={"n": i}) for i, f in enumerate(facts)]


def doubtful(cache, documents, seed=0, *, plan=None, between=None, space=HERE):
    """Put documents into a cache that searches them in doubtful stages; `between` is called before the second etc."""
    library = cache._library
    library._indexes[space.owner] = Doubtful(library._embedder.dimensions, Random(seed), plan)
    cache.add(documents, space=space)
    stages = library.stages

    def interrupted(*arguments, **options):
        for number, found in enumerate(stages(*arguments, **options)):
            yield found
            if between is not None and number == 0:
                between()

    if between is not None:
        library.stages = interrupted


def balance(cache):
    stats = cache.speculation()
    assert stats.started == stats.stood + stats.cancelled + stats.gave_way
    return stats


def test_no_answer_changes(engine, cache_of, open_gate):
    facts, documents = corpus(31, 40)
    plain, cache = cache_of(speculate=False), cache_of()
    plain.add(documents)
    random = Random(31)
    doubtful(cache, documents, 31, between=lambda: [engine.stats() for _ in range(random.choice((0, 1, 3)))])
    for turn in range(30):
        question = random.choice(random.choice(facts).facts).question
        k, where = random.randint(1, 5), random.choice((None, {"n": list(range(30))}))
        if turn % 20 == 10:
            engine.clear_cache()
        order = random.choice(("relevance", "relevance", "cache"))
        expected = plain.ask(question, k, params=BRIEF, where=where)
        answer = cache.ask(question, k, params=BRIEF, where=where, order=order)
        found = [source.document_id for source in answer.sources]
        if order == "relevance":
            assert (answer.text, answer.notes) == (expected.text, expected.notes)
            assert found == [source.document_id for source in expected.sources]
        assert sorted(found) == sorted(source.document_id for source in expected.sources)
    stats = balance(cache)
    assert stats.stood > 3
    assert stats.cancelled > 3
    assert stats.saved_seconds > 0.0
    assert plain.speculation().started == 0


def settled(engine):
    while engine.activity().running or engine.activity().waiting:
        engine.stats()


def test_a_guess_that_stands_is_the_answer(engine, cache_of, open_gate):
    facts, documents = corpus(32, 10)
    cache, known = cache_of(), []

    def between():
        engine.stats()  # by now it has been taken
        settled(engine)
        known.append(engine.activity())

    doubtful(cache, documents, plan=["right"], between=between)
    before = engine.activity()
    answer = cache.ask(facts[0].facts[0].question, params=BRIEF)
    assert len(answer.text) > 0
    after = engine.activity()
    assert after.generated_tokens - before.generated_tokens == answer.usage.completion_tokens, "generated once"
    assert (after.prompt_tokens, after.generated_tokens) == (known[0].prompt_tokens, known[0].generated_tokens), (
        "nothing was left to do after the search"
    )
    assert answer.usage.cached_tokens == 0, "what it computed itself was not found in the cache"
    assert balance(cache).stood == 1


def test_what_was_wrong_stays_as_cache(engine, cache_of, open_gate):
    facts, documents = corpus(33, 8)
    cache, question = cache_of(), facts[0].facts[0].question
    doubtful(cache, documents, plan=["fewer"], between=lambda: (engine.stats(), settled(engine)))
    found = [each.passage.document_id for each in cache.retrieve(question)]
    answer = cache.ask(question, params=BRIEF)
    assert [source.document_id for source in answer.sources] == found
    assert [source.reuse for source in answer.sources[:2]] == ["all", "all"]
    assert balance(cache).cancelled == 1


def test_after_a_wrong_guess_comes_another(engine, cache_of, open_gate):
    facts, documents = corpus(41, 8)
    cache = cache_of()
    doubtful(cache, documents, plan=["fewer", "right"])
    cache.ask(facts[0].facts[0].question, params=BRIEF)
    stats = balance(cache)
    assert (stats.started, stats.stood, stats.cancelled) == (2, 1, 1)


def test_a_guess_gives_way(engine, cache_of, open_gate, monkeypatch):
    facts, documents = corpus(34, 8)
    plain, cache, others = cache_of(speculate=False), cache_of(), []
    plain.add(documents)
    monkeypatch.setattr(Gate, "step_tokens", lambda self, stage: 1)  # the other request finds it running

    def between():
        others.append(engine.submit(engine.encode("Another request."), BRIEF, tenant=b"other"))
        engine.stats()

    doubtful(cache, documents, plan=["right"], between=between)
    question = facts[0].facts[0].question
    assert cache.ask(question, params=BRIEF).text == plain.ask(question, params=BRIEF).text
    assert [len(list(stream)) > 0 for stream in others] == [True]
    assert balance(cache).gave_way == 1


def test_tenants_and_salts_are_kept_apart(engine, cache_of, open_gate):
    facts, documents = corpus(35, 12)
    cache = cache_of()
    spaces = [Space("one", b"one"), Space("two", b"two"), Space("two", b"two", b"salt")]
    for space in spaces[:2]:
        doubtful(cache, documents, plan=["right"], space=space)
    question = facts[3].facts[0].question
    for space in spaces:
        assert all(source.reuse == "none" for source in cache.ask(question, params=BRIEF, space=space).sources)
        again = cache.ask(question, params=BRIEF, space=space)
        assert all(source.reuse == "all" for source in again.sources)
    assert balance(cache).stood > 0


def test_a_failing_search_leaves_no_guess(engine, cache_of, open_gate):
    facts, documents = corpus(36, 6)
    cache, question, failing = cache_of(), facts[0].facts[0].question, [True]

    def between():
        if failing:
            raise CatalogueError("the disk is full")

    doubtful(cache, documents, plan=["right"], between=between)
    with pytest.raises(CatalogueError, match="disk is full"):
        cache.ask(question, params=BRIEF)
    assert balance(cache).cancelled == 1
    failing.clear()
    with pytest.raises(NoDocumentsError, match="filter"):
        cache.ask(question, params=BRIEF, where={"n": 1000})
    assert cache.ask(question, params=BRIEF).sources[0].document_id == documents[0].id


def test_a_provisional_prompt_that_is_too_long_is_not_submitted(engine, cache_of, open_gate):
    cache = cache_of(passage_tokens=None)
    doubtful(cache, [Document(id="huge", text="unique " * engine.max_model_len)], plan=["right"])
    with pytest.raises(StemcacheError, match="split them into passages"):
        cache.ask("unique", params=BRIEF)
    assert cache.speculation().started == 0


def cached_texts(engine):
    tree = engine._loop.store._ledger.tree
    nodes = lambda: [node for node in tree.nodes() if node.parent is not None]  # noqa: E731
    look = lambda: [decode_tokens(b"".join(reversed([each.key for each in n.upward()]))) for n in nodes()]  # noqa: E731
    return [engine.decode(path, skip_special_tokens=False) for path in engine._loop.call(look)]


def test_deleting_while_guesses_run(engine, cache_of, open_gate):
    """Documents are deleted and changed between the stages, from another thread too; nothing of them is left."""
    facts, documents = corpus(37, 12)
    cache = cache_of()
    random, stop, failures = Random(37), threading.Event(), []

    def between():
        gone = random.choice(documents[:6])
        if cache.has(gone.id):
            cache.delete(gone.id)
        else:
            cache.add([gone])

    doubtful(cache, documents, plan=["right", "order"], between=between)

    def changing():
        try:
            turn = 0
            while not stop.wait(0.02):
                turn += 1
                cache.add([Document(id=documents[7].id, title=documents[7].title, text=f"Version {turn} of it.")])
        except Exception as error:  # shown by the assertion below
            failures.append(error)

    thread = threading.Thread(target=changing)
    thread.start()
    for _ in range(25):
        cache.ask(random.choice(random.choice(facts).facts).question, k=3, params=BRIEF)
    stop.set()
    thread.join()
    for document in (*documents[:6], documents[7]):
        if cache.has(document.id):
            cache.delete(document.id)
    engine.stats()
    texts = cached_texts(engine)
    assert failures == []
    assert not any(document.title in text for document in (*documents[:6], documents[7]) for text in texts)
    assert any(document.title in text for document in documents[8:] for text in texts)
    assert balance(cache).started > 10


def test_questions_at_once(engine, cache_of, open_gate):
    """Guesses of one thread meet the requests of others: all answers are those of a cache without speculation."""
    facts, documents = corpus(38, 20)
    plain, cache = cache_of(speculate=False), cache_of()
    plain.add(documents)
    cache._library._indexes[""] = HNSWIndex(cache._library._embedder.dimensions)
    cache.add(documents)
    questions = [fact.question for each in facts[:6] for fact in each.facts]
    expected = {question: plain.ask(question, params=BRIEF).text for question in questions}
    wrong = []

    def asking(seed):
        random = Random(seed)
        for _ in range(12):
            question = random.choice(questions)
            answer = cache.ask(question, params=BRIEF).text
            if answer != expected[question]:
                wrong.append((question, answer))

    threads = [threading.Thread(target=asking, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert balance(cache).started > 0


def test_explain_is_asked_before_anything_is_computed(cache_of, open_gate):
    facts, documents = corpus(39, 6)
    cache = cache_of()
    doubtful(cache, documents, plan=["right"])
    answer = cache.ask(facts[0].facts[0].question, params=BRIEF, explain=True)
    assert all("not read before" in source.why for source in answer.sources)
    assert cache.speculation().started == 0


def test_the_real_gate_leaves_small_catalogues_alone(cache_of):
    facts, documents = corpus(40, 30)
    cache = cache_of(index="hnsw")
    cache.add(documents)
    for each in facts[:20]:
        prepared = cache.prepare(
            cache._messages("?"), each.facts[0].question, Wish(), submit=lambda *_: pytest.fail("submitted")
        )
        assert prepared.stream is None
