"""Documents, retrieval and answers on the demo model; and that nothing of a document outlives it."""

from __future__ import annotations

import threading
from random import Random

import pytest

from stemcache import SamplingParams
from stemcache.engine.demo.facts import SYSTEM_PROMPT, is_right, random_corpus
from stemcache.engine.errors import ContextLengthError, InvalidRequestError
from stemcache.prefixtree.tokens import decode_tokens
from stemcache.ragcache.documents import Document
from stemcache.ragcache.errors import DocumentError, DocumentNotFoundError, NoDocumentsError
from stemcache.ragcache.preparation import Preparation, Space, Wish

SHORT = SamplingParams(max_tokens=24, temperature=0)
BRIEF = SamplingParams(max_tokens=2, temperature=0)
ONE, TWO = Space("one", b"one"), Space("two", b"two")


def corpus(seed, n):
    facts = random_corpus(Random(seed), n)
    return facts, [Document(id=f.title, title=f.title, text=f.text, metadata={"n": i}) for i, f in enumerate(facts)]


def remembered_texts(cache):
    """The prompts that are kept beside the engine's cache: for orders and for statistics."""
    prompts = [prompt.tokens for prompt, _ in cache._preparation.paths._tokens.values()]
    prompts += [place.prompt for place in cache._reuse._places.values()]
    return [cache.engine.decode(list(tokens), skip_special_tokens=False) for tokens in prompts]


def cached_texts(engine):
    """What the chunks of each cached path say, of all tenants."""
    tree = engine._loop.store._ledger.tree

    def look():
        nodes = [node for node in tree.nodes() if node.parent is not None]
        return [decode_tokens(b"".join(reversed([each.key for each in node.upward()]))) for node in nodes]

    return [engine.decode(path, skip_special_tokens=False) for path in engine._loop.call(look)]


def by_hand(engine, documents, question):
    """The answer and the prompt of the chat with these documents, past all of ragcache."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    prompt = engine.encode_chat(messages, documents=[{"title": d.title, "text": d.text} for d in documents])
    with engine.submit(prompt, SHORT, tenant=b"by hand") as stream:
        return "".join(delta.text for delta in stream), prompt


def test_answers_are_those_with_the_same_documents_by_hand(engine, cache_of):
    cache, (facts, documents), right = cache_of(), corpus(1, 30), 0
    cache.add(documents)
    for fact_document in facts[:3]:
        for fact in fact_document.facts[:1]:
            for order in ("relevance", "cache"):
                answer = cache.ask(fact.question, params=SHORT, order=order)
                given = [cache.get(source.document_id).document for source in answer.sources]
                assert (answer.text, answer.usage.prompt_tokens) == (
                    (expected := by_hand(engine, given, fact.question))[0],
                    len(expected[1]),
                )
                assert len(given) == 4
                right += is_right(fact, answer.text)
    assert right >= 3, "the demo model answers most of its questions from the right document"


def test_a_question_finds_its_document(cache_of):
    cache, (facts, documents) = cache_of(), corpus(2, 60)
    cache.add(documents)
    for index in ("flat", "ivf", "hnsw"):
        other = cache_of(index=index)
        other.add(documents)
        found = [
            other.retrieve(f.question, Wish(k=1))[0].passage.document_id == d.title for d in facts for f in d.facts
        ]
        assert sum(found) >= 0.98 * len(found)
        stages = list(other.retrieve_stages(facts[0].facts[0].question))
        assert stages[-1] == other.retrieve(facts[0].facts[0].question)


def test_reuse_is_told_for_each_document(cache_of):
    cache, (facts, documents) = cache_of(), corpus(3, 12)
    cache.add(documents)
    question = facts[0].facts[0].question
    first = cache.ask(question, params=SHORT, explain=True)
    assert [source.reuse for source in first.sources] == ["none"] * 4
    assert all("not read before" in source.why for source in first.sources)
    again = cache.ask(question, params=SHORT)
    assert [source.reuse for source in again.sources] == ["all"] * 4
    assert sum(source.cached_tokens for source in again.sources) < again.usage.cached_tokens
    two = cache.ask(question, k=2, params=SHORT)
    assert [source.reuse for source in two.sources] == ["all", "all"]
    turned = cache.prepare_given(
        cache._messages(question), [(s.title, s.text) for s in reversed(first.sources)], Wish(explain=True)
    )
    used = cache._answer(turned, SHORT).sources
    assert [source.reuse == "all" for source in used] == [False] * 4
    assert "after other text" in used[0].why


def test_cache_order_finds_more_and_moves_no_document_too_far(cache_of):
    cache, (facts, documents) = cache_of(), corpus(4, 6)
    cache.add(documents)
    question = facts[0].facts[0].question
    given = [(d.title, d.text) for d in documents[:4]]
    cache._answer(cache.prepare_given(cache._messages(question), given), SHORT)
    turned = list(reversed(given))
    for shift, expected in ((0, turned), (None, given)):
        wish = Wish(order="cache", max_shift=shift)
        prepared = cache.prepare_given(cache._messages(question), turned, wish)
        assert [(r.passage.title, r.passage.text) for r in prepared.retrieved] == expected
    assert cache._answer(prepared, SHORT).usage.cached_tokens >= prepared.context.spans[-1][0]


def test_a_date_at_the_front_is_found_out(cache_of):
    documents, question = corpus(5, 5)[1], "Where is it?"
    prompt = "You answer questions from documents. Today is {}. Be brief, and say only what stands in them."
    cache = cache_of(system_prompt=prompt.format("2026-11-20"))
    cache.add(documents)
    cache.ask(question, params=SHORT)
    cache.system_prompt = prompt.format("2026-11-21")
    answer = cache.ask(question, params=SHORT, explain=True)
    assert all(source.reuse == "none" for source in answer.sources)
    (note,) = answer.notes
    assert "before the documents" in note
    assert "after the documents" in note
    assert cache.ask(question, params=SHORT, explain=True).notes == ()


# -- changes ---------------------------------------------------------------------------------------------------------


def test_a_deleted_document_is_gone_everywhere(engine, cache_of):
    cache, (facts, documents) = cache_of(), corpus(6, 8)
    cache.add(documents)
    for fact_document in facts:
        cache.ask(fact_document.facts[0].question, params=SHORT)
        cache.ask(fact_document.facts[1].question, params=BRIEF, order="cache")
    for fact_document in facts[:4]:
        name = fact_document.title
        assert any(name in text for text in cached_texts(engine))
        assert any(name in text for text in remembered_texts(cache))
        assert cache.delete(name) > 0
        assert not any(name in text for text in cached_texts(engine))
        assert [text for text in remembered_texts(cache) if name in text] == []
        assert all(s.document_id != name for s in cache.ask(fact_document.facts[0].question, params=BRIEF).sources)
        with pytest.raises(DocumentNotFoundError, match="never added"):
            cache.get(name)
    assert cache._catalogue.trail.doomed() == {}


def test_an_updated_document_answers_anew(engine, cache_of):
    cache, (facts, documents) = cache_of(), corpus(7, 8)
    cache.add(documents)
    (fact, other), entity = facts[0].facts, facts[0].title
    cache.ask(fact.question, params=SHORT)
    change = cache.update(
        documents[0].id, text=f"The {fact.attribute} of {fact.entity} is 1234. Nothing else is known."
    )
    assert (change.status, change.record.version) == ("updated", 2)
    assert change.forgotten_chunks > 0
    assert not any(other.sentence in text for text in remembered_texts(cache))
    assert not any(other.sentence in text for text in cached_texts(engine))
    answer = cache.ask(fact.question, params=SHORT)
    assert answer.sources[0].text.endswith("Nothing else is known.")
    assert answer.sources[0].title == entity
    # Metadata are no content: nothing is read again.
    change = cache.update(documents[0].id, metadata={"lang": "en"})
    assert (change.status, change.record.version, change.forgotten_chunks) == ("updated", 2, 0)
    assert cache.ask(fact.question, params=SHORT).sources[0].reuse == "all"
    assert cache.add([cache.get(documents[0].id).document])[0].status == "unchanged"


def test_two_tenants_with_the_same_document(engine, cache_of):
    cache, (facts, documents) = cache_of(), corpus(8, 5)
    question = facts[0].facts[0].question
    for space in (ONE, TWO):
        cache.add(documents, space=space)
        assert all(s.reuse == "none" for s in cache.ask(question, params=SHORT, space=space).sources)
    cache.delete(documents[0].id, space=ONE)
    assert all(s.document_id != documents[0].id for s in cache.ask(question, params=SHORT, space=ONE).sources)
    theirs = cache.ask(question, params=SHORT, space=TWO)
    assert theirs.sources[0].document_id == documents[0].id
    assert all(source.reuse == "all" for source in theirs.sources)
    with pytest.raises(NoDocumentsError, match="no documents"):
        cache.ask(question)


def test_a_document_that_the_caller_brings_goes_too(engine, cache_of):
    """Its text is the catalogue's, so it is that document, whoever put it into the prompt."""
    cache, documents = cache_of(), corpus(9, 2)[1]
    cache.add(documents[:1])
    prepared = cache.prepare_given(cache._messages("What?"), [(d.title, d.text) for d in documents])
    assert [each.passage.document_id for each in prepared.retrieved] == [documents[0].id, ""]
    cache._answer(prepared, SHORT)
    assert cache.delete(documents[0].id) > 0
    assert not any(documents[0].title in text for text in cached_texts(engine))


def test_a_document_that_is_deleted_while_its_request_is_prepared(engine, cache_of):
    cache, (facts, documents) = cache_of(), corpus(10, 3)
    cache.add(documents)
    question = facts[0].facts[0].question
    prepared = cache.prepare(cache._messages(question), question)
    cache.delete(documents[0].id)
    cache._answer(prepared, SHORT)
    engine.stats()
    assert not any(documents[0].title in text for text in cached_texts(engine))
    cache.add(documents)
    prepared = cache.prepare(cache._messages(question), question)
    noted = cache._catalogue.trail.note
    cache._catalogue.trail.note = lambda *_: None  # as if the deletion came between retrieval and the note
    cache.delete(documents[0].id)
    cache._catalogue.trail.note = noted
    cache._answer(prepared, SHORT)
    engine.stats()
    assert not any(documents[0].title in text for text in cached_texts(engine))


@pytest.mark.parametrize("how", ["asked", "warmed"])
def test_a_deletion_between_retrieval_and_composition_leaves_no_prompt_behind(cache_of, monkeypatch, how):
    cache, (facts, documents) = cache_of(), corpus(11, 3)
    cache.add(documents)
    compose, composed_after = Preparation.compose, []

    def compose_after_deletion(preparation, *arguments, **options):
        if not composed_after:
            composed_after.append(cache.delete(documents[0].id))
            composed = compose(preparation, *arguments, **options)
            assert any(documents[0].title in text for text in remembered_texts(cache))
            return composed
        return compose(preparation, *arguments, **options)

    monkeypatch.setattr(Preparation, "compose", compose_after_deletion)
    if how == "asked":
        cache.ask(facts[0].facts[0].question, params=SHORT)
    else:
        cache.warm(documents[0].id)
    assert composed_after
    assert not any(documents[0].title in text for text in remembered_texts(cache))
    assert not any(documents[0].title in text for text in cached_texts(cache.engine))


def test_questions_and_deletions_at_once(engine, cache_of):
    """Threads ask while another deletes and adds: no error, and at the end nothing of what was deleted."""
    cache, (facts, documents) = cache_of(), corpus(11, 12)
    cache.add(documents)
    failures, stop = [], threading.Event()

    def asking(seed):
        random = Random(seed)
        try:
            while not stop.is_set():
                cache.ask(random.choice(random.choice(facts).facts).question, params=SamplingParams(max_tokens=2))
        except Exception as error:  # shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=asking, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    random = Random(0)
    for _ in range(15):
        gone = random.choice(documents[:6])
        cache.delete(gone.id)
        cache.add([gone])
    for document in documents[:6]:
        cache.delete(document.id)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    engine.stats()
    texts = cached_texts(engine)
    assert not any(document.title in text for document in documents[:6] for text in texts)
    assert any(document.title in text for document in documents[6:] for text in texts)


def test_time_to_live(engine, cache_of):
    now = [1000.0]
    cache, (facts, documents) = cache_of(clock=lambda: now[0]), corpus(12, 3)
    cache.add([documents[0], *(Document(id=d.id, text=d.text, expires_at=1060.0) for d in documents[1:])])
    cache.ask(facts[1].facts[0].question, params=SHORT)
    assert cache.count() == 3
    now[0] = 1060.0
    answer = cache.ask(facts[1].facts[0].question, params=SHORT)
    assert [source.document_id for source in answer.sources] == [documents[0].id]
    assert answer.notes == ("4 passages were asked for, and there are only 1",)
    assert [record.id for record in cache.list()] == [documents[0].id]
    assert not any(documents[1].text[:30] in text for text in cached_texts(engine))


# -- warming and pinning ---------------------------------------------------------------------------------------------


def test_warm_and_pin(engine, cache_of):
    cache, (facts, documents) = cache_of(), corpus(13, 3)
    cache.add(documents)
    assert cache.warm(documents[0].id) > 20
    answer = cache.ask(facts[0].facts[0].question, k=1, params=SHORT)
    assert answer.sources[0].cached_tokens > answer.sources[0].tokens - 16, "all but an unfinished chunk"
    assert cache.pin(documents[0].id) > 20
    engine.clear_cache()
    assert cache.get(documents[0].id).document.pinned
    assert cache.ask(facts[0].facts[0].question, k=1, params=SHORT).sources[0].cached_tokens > 20
    assert engine.cache.pins() != []
    cache.delete(documents[0].id)
    assert engine.cache.pins() == []
    cache.pin(documents[1].id)
    cache.unpin(documents[1].id)
    assert (engine.cache.pins(), cache.get(documents[1].id).document.pinned) == ([], False)
    with pytest.raises(DocumentNotFoundError):
        cache.warm("nobody")


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_an_empty_index_and_a_filter_that_nothing_passes(cache_of):
    cache = cache_of()
    with pytest.raises(NoDocumentsError, match="add some first") as caught:
        cache.ask("What?")
    assert caught.value.code == "no_documents"
    cache.add(corpus(14, 3)[1])
    with pytest.raises(NoDocumentsError, match="filter"):
        cache.ask("What?", where={"n": 17})
    answer = cache.ask("What?", k=50, where={"n": [0, 2]}, params=SHORT)
    assert {source.retrieved.passage.metadata["n"] for source in answer.sources} == {0, 2}
    assert answer.notes == ("50 passages were asked for, and there are only 2",)


def test_what_does_not_fit_the_context_is_left_out_and_told(engine, cache_of):
    cache = cache_of(passage_tokens=None)
    room = engine.max_model_len
    large = " ".join(f"word{i}" for i in range(room // 8))
    cache.add([Document(id=f"large {i}", text=f"{large} {i}") for i in range(4)])
    sizes = len(cache.prepare(cache._messages("word1"), "word1", Wish(k=1)).tokens)
    assert sizes < room < 4 * sizes
    answer = cache.ask("word1", params=SHORT)
    (note,) = answer.notes
    assert 0 < len(answer.sources) < 4
    assert f"{4 - len(answer.sources)} of 4 passages do not fit the context" in note
    cache.add([Document(id="huge", text="unique " * room)])
    with pytest.raises(ContextLengthError, match="split them into passages"):
        cache.ask("unique", k=1, params=SHORT)


def test_a_document_longer_than_the_context_is_split(engine, cache_of):
    facts = random_corpus(Random(15), 400)
    book = "\n\n".join(f"{each.title}\n{each.text}" for each in facts)
    assert len(engine.encode(book)) > engine.max_model_len
    cache = cache_of(passage_tokens=120)
    (change,) = cache.add([Document(id="book", text=book)])
    assert change.record.passages > 50
    for each in facts[:3]:
        answer = cache.ask(each.facts[0].question, params=SHORT)
        assert any(each.facts[0].sentence in source.text for source in answer.sources)
        assert all(source.tokens <= 125 for source in answer.sources)
    cache.delete("book")
    assert not any(facts[0].facts[0].sentence in text for text in cached_texts(engine))


@pytest.mark.parametrize(
    ("wish", "param"),
    [({"k": 0}, "rag.k"), ({"k": 101}, "rag.k"), ({"order": "id"}, "rag.order"), ({"reuse": "blend"}, "rag.reuse"),
     ({"max_shift": -1}, "rag.max_shift")],
)  # fmt: skip
def test_wishes_that_cannot_be_met(cache_of, wish, param):
    with pytest.raises(InvalidRequestError) as caught:
        cache_of().ask("What?", **wish)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"text": " "}, "text"), ({"id": "/a"}, "id"), ({"id": "a/../b"}, "id"), ({"id": "x" * 257}, "id"),
     ({"id": "a\nb"}, "id"), ({"metadata": {"a": object()}}, "metadata.a"),
     ({"metadata": {"a": "x" * 8193}}, "metadata.a")],
)  # fmt: skip
def test_documents_that_cannot_be_taken(fields, param):
    with pytest.raises(DocumentError) as caught:
        Document(**{"text": "Text.", **fields})
    assert caught.value.param == param


def test_the_same_text_is_the_same_document():
    assert Document(text="A").id == Document(text="A").id != Document(text="B").id
    assert Document(text="bc", title="a").content_hash != Document(text="c", title="ab").content_hash
