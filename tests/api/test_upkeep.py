"""Upkeep: expired documents leave by themselves, pinned ones are pinned again, and no error ends it."""

from __future__ import annotations

import logging
from pathlib import Path
from random import Random

import pytest
from waiting import until

from stemcache import Engine, SamplingParams
from stemcache.api.keys import Tenant
from stemcache.api.upkeep import Upkeep
from stemcache.engine.demo.facts import random_corpus
from stemcache.ragcache.context_cache import ContextCache
from stemcache.ragcache.documents import Document
from stemcache.ragcache.errors import CatalogueError
from stemcache.ragcache.preparation import Space

FACTS = random_corpus(Random(61), 4)
ALICE, BOB = Tenant.of("alice", b"secret"), Tenant.of("bob", b"secret")


def space_of(tenant: Tenant) -> Space:
    return Space(tenant.name, tenant.id)


def documents() -> list[Document]:
    return [Document(id=each.title, title=each.title, text=each.text) for each in FACTS]


def test_expired_documents_leave_while_nobody_asks(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    now = [1000.0]
    with ContextCache(engine, clock=lambda: now[0]) as cache, Upkeep(cache, [], seconds=0.01):
        cache.add([Document(id=each.id, text=each.text, expires_at=1060.0) for each in documents()])
        cache.ask(FACTS[0].facts[0].question, params=SamplingParams(max_tokens=1))
        before = engine.activity().pool.cached_chunks
        assert before > 0
        expire, failures = cache._documents.expire, [1, 2]

        def failing() -> None:
            if failures:
                failures.pop()
                raise CatalogueError("the disk is full")
            expire()

        with caplog.at_level(logging.WARNING):
            cache._documents.expire = failing  # type: ignore[method-assign]
            now[0] = 1060.0
            until(lambda: cache._catalogue.count("") == 0)
        assert caplog.text.count("could not be deleted: the disk is full") == 2
        until(lambda: engine.activity().pool.cached_chunks < before)


def test_pinned_documents_are_pinned_again(engine: Engine, tmp_path: Path) -> None:
    with ContextCache(engine, folder=tmp_path) as cache:
        for tenant in (ALICE, BOB):
            two = [Document(text=each.text * 3, pinned=True) for each in documents()[:2]]  # a chunk's worth at least
            cache.add(two, space=space_of(tenant))
    for tenant in (ALICE, BOB):
        for pin in engine.cache.pins(tenant=tenant.id):
            engine.cache.unpin(pin.id, tenant=tenant.id)
    with ContextCache(engine, folder=tmp_path) as cache, Upkeep(cache, [ALICE]):
        until(lambda: len(engine.cache.pins(tenant=ALICE.id)) == 2)
        assert engine.cache.pins(tenant=BOB.id) == [], "a key that is no more"
        for record in cache.list(space=space_of(ALICE)):
            cache.delete(record.id, space=space_of(ALICE))


def test_it_ends_with_the_engine(engine: Engine) -> None:
    from stemcache.engine.errors import EngineClosedError

    with ContextCache(engine) as cache:

        def closed() -> None:
            raise EngineClosedError("the engine is closed")

        cache._documents.expire = closed  # type: ignore[method-assign]
        upkeep = Upkeep(cache, [], seconds=0.01)
        with upkeep:
            until(lambda: not upkeep._thread.is_alive())
