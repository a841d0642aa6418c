"""The LlamaIndex plugin: what it sends, what it tells, and that answers are those of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import SYSTEM_PROMPT, FactDocument
from stemcache.ragcache.errors import ServerAnswerError

pytest.importorskip("llama_index.core", reason="make test-clients installs it")

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import Document, NodeWithScore, TextNode
from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from stemcache.ragcache.plugins.llamaindex import DocumentSynthesizer, Stemcache, StemcacheRetriever

FIELDS: dict[str, Any] = {"model": MODEL_PATH.name, "temperature": 0, "max_tokens": 24, "max_retries": 0}


@pytest.fixture
def llm(server: ServerProcess, async_http: httpx.AsyncClient) -> Stemcache:
    return Stemcache(api_base=f"{server.url}/v1", async_http_client=async_http, **FIELDS)


@pytest.fixture
def retriever(server: ServerProcess, corpus: list[FactDocument]) -> Iterator[StemcacheRetriever]:
    """Over the test's documents."""
    made = StemcacheRetriever(base_url=server.url, similarity_top_k=2)
    given = [
        Document(doc_id=each.title, text=each.text, metadata={"title": each.title, "n": n})
        for n, each in enumerate(corpus)
    ]
    assert made.add_documents(given) == [each.title for each in corpus]
    yield made
    made.delete([each.title for each in corpus])


def texts(nodes: list[NodeWithScore]) -> list[dict[str, str]]:
    return [{"title": each.node.metadata.get("title", ""), "text": each.node.text} for each in nodes]


def test_the_page(run_page: Callable[[str], str]) -> None:
    assert "7392" in run_page("llamaindex")


def test_the_migration(migrated: Callable[..., dict[str, Any]]) -> None:
    names = {each.__name__: each for each in (Stemcache, DocumentSynthesizer, RetrieverQueryEngine)}
    assert isinstance(migrated("llamaindex", retriever=StemcacheRetriever(), **names)["engine"], RetrieverQueryEngine)


def test_answers_are_the_engines(
    llm: Stemcache, documents: list[dict[str, str]], question: str, expected: Callable[..., str]
) -> None:
    text = expected(question, documents)
    messages = [ChatMessage(role="user", content=question)]
    answer = llm.chat(messages, documents=documents)
    assert answer.message.content == text
    assert answer.raw.usage.prompt_tokens_details.cached_tokens >= 0
    assert llm.complete(question, documents=documents).text == text
    assert [each.message.content for each in llm.stream_chat(messages, documents=documents)][-1] == text
    assert asyncio.run(llm.achat(messages, documents=documents)).message.content == text
    # What the constructor was given does not hide what the call is.
    other = Stemcache(api_base=llm.api_base, additional_kwargs={"extra_body": {"top_k": 1}}, **FIELDS)
    assert other.chat(messages, extra_body={"documents": documents}).message.content == text
    assert other.chat(messages).message.content == expected(question, [])


def test_the_server_retrieves(llm: Stemcache, retriever: StemcacheRetriever, question: str) -> None:
    found = retriever.retrieve(question)
    answer = llm.chat([ChatMessage(role="user", content=question)], rag={"k": 2})
    told = answer.raw.model_extra["rag"]["documents"]
    assert [each["id"] for each in told] == [each.node.ref_doc_id for each in found]
    assert answer.message.content == llm.complete(question, documents=texts(found)).text


def test_the_retriever(
    server: ServerProcess, retriever: StemcacheRetriever, corpus: list[FactDocument], question: str
) -> None:
    found = retriever.retrieve(question)
    best = found[0].node
    assert (best.node_id, best.ref_doc_id, best.text) == (corpus[1].title, corpus[1].title, corpus[1].text)
    assert best.metadata == {"title": corpus[1].title, "n": 1}
    assert found[0].score >= found[1].score
    assert [each.node for each in asyncio.run(retriever.aretrieve(question))] == [each.node for each in found]

    def filtered(*filters: MetadataFilter | MetadataFilters, **condition: Any) -> list[int]:
        wanted = MetadataFilters(filters=list(filters), **condition)
        nodes = StemcacheRetriever(base_url=server.url, filters=wanted).retrieve(question)
        return sorted(each.node.metadata["n"] for each in nodes)

    either = MetadataFilter(key="n", value=[0, 2], operator=FilterOperator.IN)
    two = MetadataFilter(key="n", value=2)
    assert filtered(either) == [0, 2]
    assert filtered(two, MetadataFilter(key="title", value="no one's")) == []
    for others in ((two, either), (MetadataFilter(key="n", value=2, operator=FilterOperator.GT),)):
        with pytest.raises(ValueError, match="node postprocessor"):
            filtered(*others)
    with pytest.raises(ValueError, match="node postprocessor"):
        filtered(two, condition=FilterCondition.OR)


def test_the_synthesizer_keeps_documents_apart(
    llm: Stemcache,
    retriever: StemcacheRetriever,
    question: str,
    corpus: list[FactDocument],
    expected: Callable[..., str],
) -> None:
    synthesizer = DocumentSynthesizer(llm, system_prompt=SYSTEM_PROMPT)
    engine = RetrieverQueryEngine(retriever, synthesizer)
    given = texts(retriever.retrieve(question))
    text = expected(question, given, SYSTEM_PROMPT)
    cold = engine.query(question)
    assert str(cold) == text
    assert cold.source_nodes[0].node.ref_doc_id == corpus[1].title
    warm = engine.query(corpus[1].facts[1].question)
    cached = [each.metadata["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (cold, warm)]
    assert cached[0] < cached[1]
    assert str(asyncio.run(engine.aquery(question))) == text

    streaming = DocumentSynthesizer(llm, system_prompt=SYSTEM_PROMPT, streaming=True)
    engine = RetrieverQueryEngine(retriever, streaming)
    response = engine.query(question)
    assert "".join(response.response_gen) == text
    assert response.metadata["usage"]["completion_tokens"] > 0

    async def streamed() -> str:
        answer = await engine.aquery(question)
        return "".join([each async for each in answer.async_response_gen()])

    assert asyncio.run(streamed()) == text


def test_nodes_from_elsewhere(llm: Stemcache, question: str, expected: Callable[..., str]) -> None:
    """Their metadata is told where LlamaIndex tells it, in the text; the title once."""
    node = TextNode(text="The code of Velmora is 7392.", metadata={"title": "Velmora"})
    answer = DocumentSynthesizer(llm).synthesize("What is the code of Velmora?", [NodeWithScore(node=node)])
    told = [{"title": "", "text": "title: Velmora\n\nThe code of Velmora is 7392."}]
    assert str(answer) == expected("What is the code of Velmora?", told)
    texts_alone = DocumentSynthesizer(llm).get_response("What is the code of Velmora?", [node.text])
    assert texts_alone == expected("What is the code of Velmora?", [{"title": "", "text": node.text}])
    assert str(DocumentSynthesizer(llm).synthesize(question, [])) == "Empty Response"


def test_another_llm_takes_no_documents() -> None:
    with pytest.raises(ValueError, match="not to a MockLLM"):
        DocumentSynthesizer(MockLLM())


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "openai's")
    monkeypatch.delenv("STEMCACHE_API_KEY", raising=False)
    assert Stemcache("m").api_key == "none"
    monkeypatch.setenv("STEMCACHE_API_KEY", "ours")
    assert Stemcache("m").api_key == "ours"
    again = Stemcache.from_dict(Stemcache("m", context_window=1024).to_dict())
    assert (again.model, again.context_window, again.api_base) == ("m", 1024, "http://127.0.0.1:8000/v1")


def test_nobody_answers() -> None:
    with pytest.raises(ServerAnswerError, match="stemcache serve"):
        StemcacheRetriever(base_url="http://127.0.0.1:9").retrieve("What?")
