"""Documents that are pinned: by whatever way they come, through changes and restarts, and as far as there is room."""

from __future__ import annotations

import logging
import sqlite3
from random import Random

import pytest

from stemcache import SamplingParams
from stemcache.engine.demo.facts import SYSTEM_PROMPT, random_corpus
from stemcache.engine.errors import InvalidRequestError
from stemcache.ragcache.documents import Document
from stemcache.ragcache.errors import DocumentError

BRIEF = SamplingParams(max_tokens=2, temperature=0)
FACTS = random_corpus(Random(51), 8)


def document(number, **fields):
    return Document(id=f"d{number}", title=FACTS[number].title, text=FACTS[number].text, **fields)


def survives(engine, cache, number):
    """Whether a document is there when everything that is not pinned has gone."""
    engine.clear_cache()
    return cache.ask(FACTS[number].facts[0].question, k=1, params=BRIEF).sources[0].cached_tokens > 16


@pytest.fixture(autouse=True)
def no_pins_are_left(engine):
    yield
    for pin in engine.cache.pins():
        engine.cache.unpin(pin.id)


def test_pinned_by_adding_and_by_updating(engine, cache_of):
    cache = cache_of()
    cache.add([document(0, pinned=True), document(1)])
    assert (survives(engine, cache, 0), survives(engine, cache, 1)) == (True, False)
    cache.update("d0", metadata={"a": 1})
    assert survives(engine, cache, 0)
    cache.update("d0", text=FACTS[0].text + " And more is known.")
    assert survives(engine, cache, 0), "its new text is pinned"
    assert len(engine.cache.pins()) == 1
    cache.update("d1", pinned=True)
    assert survives(engine, cache, 1)
    cache.add([document(0)])  # as it is now, it is not pinned
    assert (survives(engine, cache, 0), survives(engine, cache, 1)) == (False, True)
    cache.delete("d1")
    assert engine.cache.pins() == []


def test_pinned_after_a_system_prompt_of_its_own(engine, cache_of):
    cache = cache_of(system_prompt="")
    cache.add([document(2, pinned=True, system_prompt=SYSTEM_PROMPT)])
    assert not survives(engine, cache, 2)
    cache.system_prompt = SYSTEM_PROMPT
    assert survives(engine, cache, 2)
    with pytest.raises(DocumentError, match="pin it too") as caught:
        Document(text="T", system_prompt="S")
    assert caught.value.param == "system_prompt"
    cache.unpin("d2")
    assert cache.get("d2").document.system_prompt is None


def test_restarts(engine, cache_of, tmp_path):
    cache = cache_of(folder=tmp_path)
    cache.add([document(3, pinned=True, system_prompt=SYSTEM_PROMPT), document(4)])
    cache.close()
    for pin in engine.cache.pins():  # as a new engine has none
        engine.cache.unpin(pin.id)
    later = cache_of(folder=tmp_path)
    assert not survives(engine, later, 3)
    assert later.warm_pinned(should_stop=lambda: True) == 0
    assert later.warm_pinned() == 1
    assert (survives(engine, later, 3), survives(engine, later, 4)) == (True, False)
    assert later.warm_pinned() == 1
    assert len(engine.cache.pins()) == 1


def test_there_is_no_room(engine, cache_of, tmp_path, caplog):
    cache = cache_of(folder=tmp_path, passage_tokens=None)
    text = "word " * 500
    size, room = len(engine.encode(text)), engine.stats().store.total_chunks * 16 // 2
    many = [Document(id=f"m{i}", text=f"{i} {text}") for i in range(room // size + 2)]
    with pytest.raises(
        InvalidRequestError, match=r"document 'm\d' was added, but cannot be pinned: this pin"
    ) as caught:
        cache.add([Document(id=each.id, text=each.text, pinned=True) for each in many])
    assert (caught.value.param, caught.value.code) == ("pinned", "pin_limit_exceeded")
    records = cache.list()
    assert [record.document.pinned for record in records] == [True] * (len(records) - 1) + [False]
    kept = len(engine.cache.pins())
    assert kept == len(records) - 1 > 0
    # A pool that was larger when it was stopped.
    cache._catalogue.database._db.execute("UPDATE documents SET pinned = 1")
    with caplog.at_level(logging.WARNING):
        assert cache.warm_pinned() == kept
    assert "is not pinned again: this pin needs" in caplog.text


def test_a_catalogue_from_before_is_taken_over(cache_of, tmp_path):
    cache = cache_of(folder=tmp_path)
    cache.add([document(5), document(6)])
    before = [(record.document, record.version) for record in cache.list()]
    cache.close()
    with sqlite3.connect(tmp_path / "documents.sqlite") as db:
        db.execute("ALTER TABLE documents DROP COLUMN system_prompt")
        db.execute("UPDATE settings SET value = 1 WHERE name = 'format'")
    db.close()
    later = cache_of(folder=tmp_path)
    assert [(record.document, record.version) for record in later.list()] == before
    later.update("d5", pinned=True, system_prompt="S")
    assert later.get("d5").document.system_prompt == "S"
    later.unpin("d5")
