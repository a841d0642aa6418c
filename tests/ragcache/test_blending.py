"""Moved documents: answers stay right, nobody else gets them, and a model on which they fail is refused."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest
import torch

from stemcache import SamplingParams
from stemcache.engine.demo.facts import SYSTEM_PROMPT, is_right, random_corpus
from stemcache.engine.errors import BlendRefusedError, InvalidRequestError
from stemcache.prefixtree.tokens import decode_tokens
from stemcache.ragcache import calibration
from stemcache.ragcache.calibration import Question, Verdict, calibrate, demo_questions, read_questions
from stemcache.ragcache.documents import Document
from stemcache.ragcache.errors import CalibrationError
from stemcache.ragcache.preparation import Space, Wish

SHORT = SamplingParams(max_tokens=24, temperature=0)
EXACT, BLEND = Wish(), Wish(reuse="blend")
PASSED = Verdict(share=0.15, questions=100, right_computed=100, right_moved=100, prompt_tokens=1000, moved_tokens=600)


@pytest.fixture
def cache(cache_of):
    """A context cache that is switched on."""
    made = cache_of()
    made.blending.verdict = PASSED
    return made


def ask(cache, facts, question, wish=BLEND, space=Space()):  # noqa: B008
    given = [(each.title, each.text) for each in facts]
    return cache._answer(cache.prepare_given(cache._messages(question), given, wish, space=space), SHORT)


def plain_answer(engine, facts, question):
    """Past all of ragcache, as a tenant of its own."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    prompt = engine.encode_chat(messages, documents=[each.as_template_document() for each in facts])
    with engine.submit(prompt, SHORT, tenant=b"plain") as stream:
        return "".join(delta.text for delta in stream)


def cached_texts(engine):
    """What the chunks of each cached path say, of all tenants."""
    tree = engine._loop.store._ledger.tree

    def look():
        nodes = [node for node in tree.nodes() if node.parent is not None]
        return [decode_tokens(b"".join(reversed([each.key for each in node.upward()]))) for node in nodes]

    return [engine.decode(path, skip_special_tokens=False) for path in engine._loop.call(look)]


def test_documents_in_any_order_are_moved_and_exact_requests_never_notice(engine, cache):
    facts, rng, right = random_corpus(Random(21), 10), Random(0), 0
    for _ in range(5):
        chosen = rng.sample(facts, 5)
        fact = rng.choice(rng.choice(chosen).facts)
        answer = ask(cache, chosen, fact.question)
        right += is_right(fact, answer.text)
        first, *others = answer.sources
        assert first.reuse == "all", "the first passage stands where it was read"
        for source in others:
            assert source.reuse == "moved"
            again = -(-source.tokens * 15 // 100)  # of which a few may be cached: titles begin alike
            assert source.computed_tokens + source.cached_tokens == max(again, source.cached_tokens)
            assert "read elsewhere" in source.why
        assert answer.usage.moved_tokens == sum(source.moved_tokens for source in others)
        exact = ask(cache, chosen, fact.question, EXACT)
        assert exact.usage.moved == ()
        assert exact.text == plain_answer(engine, chosen, fact.question)
    assert right >= 4


def test_one_passage_is_read_in_its_place(cache):
    (facts,) = random_corpus(Random(22), 1)
    answer = ask(cache, [facts], facts.facts[0].question)
    assert answer.usage.moved == ()
    assert is_right(facts.facts[0], answer.text)


def test_tenants_and_salts_do_not_share_what_is_moved(engine, cache):
    facts = random_corpus(Random(23), 3)
    ask(cache, facts, "What?", space=Space("one", b"one"))
    before = engine.stats().store.cached_chunks
    for space in (Space("two", b"two"), Space("one", b"one", b"salt")):
        assert ask(cache, facts[::-1], "What?", space=space).usage.moved_tokens
        after = engine.stats().store.cached_chunks
        assert after > before, "each has read the documents itself"
        before = after
    ask(cache, facts[1:] + facts[:1], "What?", space=Space("one", b"one"))
    after = engine.stats().store.cached_chunks
    assert after - before <= 1, "nothing is read twice, and of the blend the chunk before the first move is kept"


def test_deleting_a_document_removes_what_was_read_for_moving_it(engine, cache):
    facts = random_corpus(Random(24), 4)
    cache.add([Document(id=f.title, title=f.title, text=f.text) for f in facts])
    question = facts[2].facts[0].question
    assert cache.ask(question, params=SHORT, reuse="blend").usage.moved_tokens
    secret = facts[2].facts[0].sentence
    assert any(secret in text for text in cached_texts(engine))
    prepared = cache.prepare(cache._messages(question), question, BLEND)
    endless = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    with engine.submit(prepared.tokens, endless, blend=prepared.blend) as stream:
        next(iter(stream))
        started = engine.stats().preemptions
        assert cache.delete(facts[2].title) > 0
        assert engine.stats().preemptions == started + 1, "the running request began anew"
        stream.cancel()
    engine.stats()
    assert not any(secret in text for text in cached_texts(engine))
    late = cache.prepare(cache._messages("What?"), "What?", Wish(k=3, reuse="blend"))
    cache.delete(facts[0].title)  # after it was prepared, and its passages were read
    with engine.submit(late.tokens, SHORT, blend=late.blend) as stream:
        cache.submitted(late)
        list(stream)
    cache.expire()
    engine.check()
    assert not any(facts[0].facts[0].sentence in text for text in cached_texts(engine))


def test_reuse_by_document_counts_each_token_once(cache):
    facts = random_corpus(Random(25), 6)
    cache.add([Document(id=f.title, title=f.title, text=f.text) for f in facts])
    found, missed = Counter(), Counter()
    for each in facts[:3]:
        for source in cache.ask(each.facts[0].question, params=SHORT, reuse="blend").sources:
            found[source.document_id] += source.cached_tokens + source.moved_tokens
            missed[source.document_id] += source.computed_tokens
    told = cache.reuse()
    assert {each.document_id: each.hit_tokens + each.moved_tokens for each in told} == found
    assert {each.document_id: each.miss_tokens for each in told} == missed
    assert sum(each.requests for each in told) == 3 * 4
    assert all(each.cached_tokens >= each.tokens for each in told), "each is cached where it was read alone"


def test_it_is_off_until_it_was_tried(cache_of):
    cache = cache_of()
    cache.add(["One text.", "Another text."])
    for call in (lambda: cache.ask("What?", reuse="blend"), lambda: ask(cache, random_corpus(Random(1), 2), "What?")):
        with pytest.raises(InvalidRequestError, match=r"switched off.*switch_on") as caught:
            call()
        assert caught.value.param == "rag.reuse"


def test_the_demo_model_passes_and_is_tried_once(engine, cache_of, tmp_path, monkeypatch):
    questions, before = demo_questions(51, documents=(2, 3)), engine.stats().store.cached_chunks
    verdict = cache_of().blending.switch_on(questions, folder=tmp_path / "blend")
    assert verdict.right_computed >= 50
    assert verdict.right_moved >= verdict.right_computed - 1
    assert verdict.moved_tokens > 0.2 * verdict.prompt_tokens
    assert engine.stats().store.cached_chunks == before, "the questions leave nothing behind"
    (file,) = (tmp_path / "blend").iterdir()
    measured = []
    monkeypatch.setattr(calibration, "measure", lambda *_: measured.append(1) or PASSED)
    assert cache_of().blending.switch_on(questions, folder=file.parent) == verdict
    assert not measured
    for other in ({"share": 0.2}, {"questions": questions[1:]}):
        calibrate(engine, **{"questions": questions, "share": 0.15, "folder": file.parent} | other)
    assert len(measured) == 2, "another share or other questions are another matter"
    for damage in ("{", "[]", '{"share": 0.15}'):
        file.write_text(damage)
        calibrate(engine, questions, share=0.15, folder=file.parent)
    assert len(measured) == 5
    assert json.loads(file.read_text())["right_moved"] == PASSED.right_moved
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert calibrate(engine, questions, share=0.15, folder=blocked / "below") == PASSED


def test_a_model_whose_answers_suffer_is_refused(engine, cache_of):
    """Keys that are turned by random angles: the quality is measured, whatever the proof of the rotation would say."""
    mover = engine._loop.mover
    engine.require_movable()
    right, torch_rng = mover.frequencies, torch.Generator().manual_seed(0)
    mover.frequencies = torch.rand(right.shape, generator=torch_rng)
    cache = cache_of()
    try:
        with pytest.raises(BlendRefusedError, match=r"^documents are not moved in this model: \d+ of 50 questions.*%"):
            cache.blending.switch_on(demo_questions(50, documents=(2, 3)))
        assert cache.blending.verdict is None
        mover.is_proved = False
        with pytest.raises(BlendRefusedError, match="cannot be moved by rotating"):
            cache.blending.switch_on(demo_questions(50, documents=(2, 3)))
    finally:
        mover.frequencies = right
    engine.require_movable()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"right_moved": 97}, "loss of more than 2%"),
        ({"right_computed": 49, "right_moved": 49}, "cannot tell"),
        ({"moved_tokens": 0}, "nothing could be moved"),
        ({"right_moved": 98}, None),
    ],
)
def test_verdicts(change, reason):
    fields = dict(share=0.15, questions=100, right_computed=100, right_moved=100, prompt_tokens=10, moved_tokens=6)
    verdict = Verdict(**fields | change)
    if reason is None:
        verdict.require_passed()
        return
    with pytest.raises(BlendRefusedError, match=reason) as caught:
        verdict.require_passed()
    assert f"{verdict.right_moved} of 100 questions" in str(caught.value)


def test_right_answers():
    assert Question((), "?", "The code is  73").is_right("Well, the CODE is 73.", "")
    assert not Question((), "?", "73").is_right("74", "73")
    assert Question((), "?").is_right(" so be it", "So be\nit")
    assert not Question((), "?").is_right("so be", "so be it")


def test_questions_from_a_file(tmp_path):
    file = tmp_path / "questions.jsonl"
    record = {"documents": [{"text": "A."}, {"title": "T", "text": "B."}], "question": "What?"}
    full = record | {"answer": "A", "system": "S"}
    file.write_text("\n".join(map(json.dumps, (record, full))) + "\n\n")
    documents = (("", "A."), ("T", "B."))
    assert read_questions(file) == [Question(documents, "What?"), Question(documents, "What?", "A", "S")]
    for bad in ("{", "[]", '{"question": "?"}', json.dumps(full | {"answers": 1}), '{"documents": [1], "question": 2}'):
        file.write_text(f"{json.dumps(record)}\n{bad}\n")
        with pytest.raises(CalibrationError, match="line 2"):
            read_questions(file)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_questions(tmp_path / "none")


def test_too_few_questions(engine):
    for questions in (demo_questions(49), [Question((("", "A."),), "?")] * 60):
        with pytest.raises(CalibrationError, match="at least 50 questions, each with two documents"):
            calibrate(engine, questions, share=0.15)
