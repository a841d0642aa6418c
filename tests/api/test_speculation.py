"""Speculation over HTTP: chats whose prompt was submitted while their search went on answer as all others do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stemcache import Engine
from stemcache.api.limits import Limits
from stemcache.api.server import create_app
from stemcache.engine.demo.facts import random_corpus
from stemcache.prefixtree.expected import Expected
from stemcache.ragcache.context_cache import ContextCache
from stemcache.ragcache.documents import Document
from stemcache.ragcache.gate import Gate
from stemcache.ragcache.preparation import Space

FACTS = random_corpus(Random(171), 12)
DOCUMENTS = [Document(id=each.title, title=each.title, text=each.text) for each in FACTS]
QUESTIONS = [fact.question for each in FACTS[:4] for fact in each.facts]


@pytest.fixture
def documents(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[ContextCache]:
    """A graph of documents, searched in stages whatever that takes, by an engine whose books are right at the end."""
    monkeypatch.setattr(Gate, "wants_stages", lambda self: True)
    monkeypatch.setattr(Gate, "step_tokens", lambda self, stage: 64)
    engine.clear_cache()
    with ContextCache(engine, index="hnsw") as cache:
        cache.add(DOCUMENTS, space=Space(""))
        yield cache
    engine.check()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.store.leases, stats.store.claims) == (0, 0, 0, 0)


@asynccontextmanager
async def connect(engine: Engine, documents: ContextCache, **limits: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(engine, documents=documents, limits=Limits(**limits)))
    async with httpx.AsyncClient(transport=transport, base_url="http://app", timeout=None) as client:
        yield client


def body(question: str, **fields: Any) -> dict[str, Any]:
    chat = {"messages": [{"role": "user", "content": question}], "max_tokens": 12, "temperature": 0, "rag": {"k": 3}}
    return chat | {"return_token_ids": True} | fields


async def counters(client: httpx.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    return {
        sample.name.removeprefix("stemcache_speculation") + sample.labels.get("outcome", ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("stemcache_speculation")
    }


@pytest.mark.parametrize("speculates", [True, False])
def test_the_engine_is_told_what_was_asked_for(
    engine: Engine, documents: ContextCache, monkeypatch: pytest.MonkeyPatch, speculates: bool
) -> None:
    told: list[float] = []
    submit = engine.submit

    def submit_and_note(*args: Any, expected: Expected, **options: Any) -> Any:
        told.append(round(expected.of(30)))
        return submit(*args, expected=expected, **options)

    async def ask() -> None:
        async with connect(engine, documents) as client:
            for _ in range(3):
                (await client.post("/v1/chat/completions", json=body(QUESTIONS[0]))).raise_for_status()
                asked.append(told[-1])

    asked: list[float] = []
    documents._speculates = speculates
    monkeypatch.setattr(engine, "submit", submit_and_note)
    asyncio.run(ask())
    assert asked == [0, 1, 2]


def test_answers_are_the_same_and_counted(engine: Engine, documents: ContextCache) -> None:
    async def ask() -> tuple[list[Any], dict[str, float]]:
        async with connect(engine, documents) as client:
            answers = []
            for question in QUESTIONS:
                response = await client.post("/v1/chat/completions", json=body(question))
                assert response.status_code == 200, response.text
                answers.append(response.json())
            return answers, await counters(client)

    guessed, counted = asyncio.run(ask())
    documents._speculates = False
    engine.clear_cache()
    plain, unchanged = asyncio.run(ask())
    for one, other in zip(guessed, plain, strict=True):
        assert one["choices"][0]["message"] == other["choices"][0]["message"]
        assert one["prompt_token_ids"] == other["prompt_token_ids"]
        assert [each["id"] for each in one["rag"]["documents"]] == [each["id"] for each in other["rag"]["documents"]]
        # Counted as without speculation: what the guess computed itself is no hit.
        assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]
    assert guessed[0]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert counted["s_started_total"] >= counted["s_totalstood"] > 0
    # None, where the engine's thread was not given the processor while a search went on.
    assert counted["_saved_seconds_total"] == pytest.approx(documents.speculation().saved_seconds)
    assert unchanged == counted


def test_streams_and_choices(engine: Engine, documents: ContextCache) -> None:
    async def ask() -> list[str]:
        async with connect(engine, documents) as client:
            response = await client.post("/v1/chat/completions", json=body(QUESTIONS[0], n=2, stream=True, seed=1))
            chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
            texts = ["", ""]
            for choice in [choice for chunk in chunks for choice in chunk["choices"]]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
            assert len(chunks[0]["rag"]["documents"]) == 3
            return texts

    guessed = asyncio.run(ask())
    assert documents.speculation().stood == 1
    documents._speculates = False
    assert asyncio.run(ask()) == guessed
    assert len(guessed[0]) > 0


def test_limits_come_first(engine: Engine, documents: ContextCache) -> None:
    async def ask() -> list[httpx.Response]:
        async with connect(engine, documents, choices=2) as client:
            return [
                await client.post("/v1/chat/completions", json=body(QUESTIONS[0], **fields))
                for fields in ({"n": 3}, {"max_tokens": 10**6}, {"truncate_prompt_tokens": 20})
            ]

    assert [response.status_code for response in asyncio.run(ask())] == [400, 400, 400]
    assert documents.speculation().started == 0


def test_many_clients_at_once(engine: Engine, documents: ContextCache) -> None:
    async def ask() -> list[Any]:
        async with connect(engine, documents) as client:
            posts = [client.post("/v1/chat/completions", json=body(question)) for question in QUESTIONS]
            return [response.json()["choices"][0]["message"] for response in await asyncio.gather(*posts)]

    guessed = asyncio.run(ask())
    stats = documents.speculation()
    assert stats.started == stats.stood + stats.cancelled + stats.gave_way
    documents._speculates = False
    assert asyncio.run(ask()) == guessed
