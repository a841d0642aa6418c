"""The Haystack plugin: pipelines, serialised ones too, and that answers are those of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import FactDocument
from stemcache.ragcache.errors import ServerAnswerError

pytest.importorskip("haystack", reason="make test-clients installs it")

from haystack import Document, Pipeline
from haystack.components.preprocessors import DocumentSplitter
from haystack.components.writers import DocumentWriter
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.document_stores.types import DuplicatePolicy
from haystack.errors import FilterError
from haystack.utils import Secret

from stemcache.ragcache.plugins.haystack import StemcacheChatGenerator, StemcacheDocumentStore, StemcacheRetriever

PARAMETERS = {"temperature": 0, "max_tokens": 24}


@pytest.fixture
def documents(corpus: list[FactDocument]) -> list[Document]:
    return [Document(content=each.text, meta={"title": each.title, "n": n}) for n, each in enumerate(corpus)]


@pytest.fixture
def store(server: ServerProcess, documents: list[Document]) -> Iterator[StemcacheDocumentStore]:
    """With the test's documents."""
    made = StemcacheDocumentStore(server.url)
    assert made.write_documents(documents) == len(documents)
    yield made
    made.delete_documents([each.id for each in made.filter_documents()])


@pytest.fixture
def generator(server: ServerProcess) -> StemcacheChatGenerator:
    return StemcacheChatGenerator(
        MODEL_PATH.name,
        api_base_url=f"{server.url}/v1",
        generation_kwargs=PARAMETERS,
        max_retries=0,
        # A connection that was kept belongs to the event loop that it began in, and outlives the test.
        http_client_kwargs={"limits": {"max_keepalive_connections": 0}},
    )


def texts(documents: list[Document]) -> list[dict[str, str]]:
    return [{"title": each.meta["title"], "text": each.content or ""} for each in documents]


def cached(reply: ChatMessage) -> int:
    return int(reply.meta["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_the_page(run_page: Callable[[str], str]) -> None:
    assert "7392" in run_page("haystack")


def test_the_migration(migrated: Callable[..., dict[str, Any]]) -> None:
    pipeline = Pipeline()
    pipeline.add_component("retriever", StemcacheRetriever(StemcacheDocumentStore()))
    migrated("haystack", pipeline=pipeline, StemcacheChatGenerator=StemcacheChatGenerator)
    assert set(pipeline.inputs()["llm"]) >= {"messages", "rag"}
    assert "documents" not in pipeline.inputs()["llm"], "they come from the retriever"


def test_answers_are_the_engines(
    generator: StemcacheChatGenerator, documents: list[Document], question: str, expected: Callable[..., str]
) -> None:
    text = expected(question, texts(documents))
    messages = [ChatMessage.from_user(question)]
    [answer] = generator.run(messages, documents)["replies"]
    assert answer.text == text
    [asynchronous] = asyncio.run(generator.run_async(messages, documents))["replies"]
    assert asynchronous.text == text
    chunks: list[StreamingChunk] = []
    more = {"stream_options": {"include_usage": True}}
    [streamed] = generator.run(messages, documents, streaming_callback=chunks.append, generation_kwargs=more)["replies"]
    assert streamed.text == text == "".join(each.content for each in chunks)
    assert cached(streamed) >= 64
    with pytest.raises(ValueError, match="no text"):
        generator.run(messages, [Document(meta={"a": 1})])


def test_a_pipeline_that_was_saved(
    server: ServerProcess,
    store: StemcacheDocumentStore,
    generator: StemcacheChatGenerator,
    corpus: list[FactDocument],
    expected: Callable[..., str],
) -> None:
    made = Pipeline()
    made.add_component("retriever", StemcacheRetriever(store, top_k=2))
    made.add_component("llm", generator)
    made.connect("retriever.documents", "llm.documents")
    pipeline = Pipeline.loads(made.dumps(), allowed_modules=["stemcache"])
    assert pipeline.to_dict() == made.to_dict()
    replies = []
    for fact in corpus[1].facts[:2]:
        inputs = {"retriever": {"query": fact.question}, "llm": {"messages": [ChatMessage.from_user(fact.question)]}}
        result = pipeline.run(inputs, include_outputs_from={"retriever"})
        found = result["retriever"]["documents"]
        replies += result["llm"]["replies"]
        assert found[0].meta["title"] == corpus[1].title
        assert replies[-1].text == expected(fact.question, texts(found))
    assert cached(replies[0]) < cached(replies[1])
    assert asyncio.run(pipeline.run_async(inputs))["llm"]["replies"][0].text == replies[1].text


def test_the_server_retrieves(store: StemcacheDocumentStore, generator: StemcacheChatGenerator, question: str) -> None:
    found = StemcacheRetriever(store, top_k=2).run(question)["documents"]
    [mine] = generator.run(question, found)["replies"]
    [theirs] = generator.run(question, rag={"k": 2})["replies"]
    assert theirs.text == mine.text
    assert cached(theirs) > cached(mine)


def test_the_retriever(store: StemcacheDocumentStore, documents: list[Document], question: str) -> None:
    retriever = StemcacheRetriever(store, top_k=2)
    found = retriever.run(question)["documents"]
    assert (found[0].id, found[0].content, found[0].meta) == (documents[1].id, documents[1].content, documents[1].meta)
    assert found[0].score >= found[1].score
    assert asyncio.run(retriever.run_async(question))["documents"] == found
    assert len(retriever.run(question, top_k=1)["documents"]) == 1

    def chosen(filters: dict[str, Any]) -> list[int]:
        return sorted(each.meta["n"] for each in retriever.run(question, filters=filters)["documents"])

    either = {"field": "meta.n", "operator": "in", "value": [0, 2]}
    two = {"field": "meta.n", "operator": "==", "value": 2}
    name = {"field": "title", "operator": "==", "value": "no one's"}
    assert chosen(either) == [0, 2]
    assert chosen({"operator": "AND", "conditions": [two]}) == [2]
    assert chosen({"operator": "AND", "conditions": [two, name]}) == []
    refused: list[dict[str, Any]] = [
        {"operator": "AND", "conditions": [two, either]},
        {"operator": "OR", "conditions": [two, either]},
        {"field": "meta.n", "operator": ">", "value": 1},
        {"field": "meta.n", "operator": "==", "value": [1]},
        {"field": "meta.n", "operator": "in", "value": 1},
        {"field": "meta.n", "operator": "==", "value": None},
    ]
    for each in refused:
        with pytest.raises(FilterError, match="filter_documents"):
            chosen(each)


def test_indexing_with_haystacks_splitter(store: StemcacheDocumentStore) -> None:
    """Whose metadata is nested; and what the server splits in addition tells whose passage it is."""
    text = " ".join(f"Sentence {n} is about nothing in particular." for n in range(30))
    indexing = Pipeline()
    indexing.add_component("splitter", DocumentSplitter(split_by="word", split_length=50, split_overlap=10))
    indexing.add_component("writer", DocumentWriter(store, policy=DuplicatePolicy.OVERWRITE))
    indexing.connect("splitter", "writer")
    result = indexing.run({"splitter": {"documents": [Document(content=text)]}})
    kept = store.filter_documents({"field": "meta.source_id", "operator": "==", "value": Document(content=text).id})
    assert len(kept) == result["writer"]["documents_written"] > 2
    assert any(each.meta["_split_overlap"] for each in kept)
    long = Document(id="long", content=" ".join(f"The code of tower {n} is {n}." for n in range(500)))
    store.write_documents([long])
    found = [each for each in store.search("What is the code of tower 400?", 100) if each.id.startswith("long")]
    assert len(found) > 2
    for each in found:
        whose = each.meta.get("source_id", "long"), each.id
        assert whose == ("long", f"long#{each.meta['split_id']}" if "split_id" in each.meta else "long")


def test_embeddings_are_told_to_be_left_out(store: StemcacheDocumentStore, caplog: pytest.LogCaptureFixture) -> None:
    store.write_documents([Document(id="e", content="T", embedding=[0.5])])
    assert "embeds texts itself" in caplog.text
    with pytest.raises(ValueError, match="has no text"):
        store.write_documents([Document(id="none", meta={"a": 1})])


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "openai's")
    monkeypatch.delenv("STEMCACHE_API_KEY", raising=False)
    generator = StemcacheChatGenerator("m")
    generator.warm_up()
    assert generator.client is not None
    assert (generator.client.api_key, str(generator.client.base_url)) == ("none", "http://127.0.0.1:8000/v1/")
    monkeypatch.setenv("STEMCACHE_API_KEY", "ours")
    assert "ours" not in str(generator.to_dict())
    again = StemcacheChatGenerator.from_dict(generator.to_dict())
    again.warm_up()
    assert again.client is not None
    assert again.client.api_key == "ours"
    store = StemcacheDocumentStore(api_key=Secret.from_token("t"))
    with pytest.raises(ValueError, match="token"):
        store.to_dict()


def test_nobody_answers() -> None:
    store = StemcacheDocumentStore("http://127.0.0.1:9")
    with pytest.raises(ServerAnswerError, match="stemcache serve"):
        store.count_documents()
