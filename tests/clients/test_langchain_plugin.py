"""The LangChain plugin: what it sends, what it tells, and that answers are those of the engine."""

from __future__ import annotations

import asyncio
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import FactDocument
from stemcache.ragcache.errors import ServerAnswerError

pytest.importorskip("langchain", reason="make test-clients installs it")

from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from stemcache.ragcache.plugins.langchain import (
    ChatStemcache,
    DocumentsMiddleware,
    StemcacheRetriever,
    create_documents_chain,
)

FIELDS: dict[str, Any] = {"model": MODEL_PATH.name, "temperature": 0, "max_retries": 0, "max_tokens": 24}


@tool
def open_gate(gate: str) -> str:
    """Open a gate."""
    return f"{gate} is open."


@pytest.fixture
def model(server: ServerProcess, async_http: httpx.AsyncClient) -> ChatStemcache:
    return ChatStemcache(base_url=f"{server.url}/v1", http_async_client=async_http, **FIELDS)


@pytest.fixture
def documents(corpus: list[FactDocument]) -> list[Document]:
    return [Document(each.text, id=each.title, metadata={"title": each.title, "n": n}) for n, each in enumerate(corpus)]


@pytest.fixture
def retriever(server: ServerProcess, documents: list[Document]) -> Iterator[StemcacheRetriever]:
    """Over the test's documents."""
    made = StemcacheRetriever(base_url=server.url, k=2)
    assert made.add_documents(documents) == [each.id for each in documents]
    yield made
    made.delete([str(each.id) for each in documents])


def texts(documents: list[Document]) -> list[dict[str, str]]:
    return [{"title": each.metadata["title"], "text": each.page_content} for each in documents]


def test_the_page(run_page: Callable[[str], str]) -> None:
    assert "7392" in run_page("langchain")


def test_the_migration(migrated: Callable[..., dict[str, Any]]) -> None:
    names = {each.__name__: each for each in (ChatPromptTemplate, ChatStemcache, create_documents_chain)}
    assert isinstance(migrated("langchain", **names)["chain"], Runnable)


def test_answers_are_the_engines(
    model: ChatStemcache, documents: list[Document], question: str, expected: Callable[..., str]
) -> None:
    as_mappings = texts(documents)
    text = expected(question, as_mappings)
    assert model.invoke(question, documents=documents).content == text
    assert model.bind(documents=as_mappings).invoke(question).content == text
    assert "".join(str(each.content) for each in model.stream(question, documents=documents)) == text
    assert asyncio.run(model.ainvoke(question, documents=documents)).content == text
    by_hand = model.invoke(question, extra_body={"documents": as_mappings, "top_k": 1})
    assert by_hand.content == text


def test_cached_tokens_are_told(model: ChatStemcache, documents: list[Document], corpus: list[FactDocument]) -> None:
    cold, warm = (model.invoke(fact.question, documents=documents) for fact in corpus[0].facts[:2])
    assert cold.usage_metadata["input_token_details"]["cache_read"] < 64
    assert warm.usage_metadata["input_token_details"]["cache_read"] >= 64
    chunks = list(model.stream(corpus[0].facts[1].question, documents=documents))
    assert sum(chunks[1:], chunks[0]).usage_metadata["input_token_details"]["cache_read"] >= 64


def test_the_server_retrieves(model: ChatStemcache, retriever: StemcacheRetriever, question: str) -> None:
    """As the retriever does, with the same answer; and it reports, whole and streamed."""
    found = retriever.invoke(question)
    mine = model.invoke(question, documents=found)
    theirs = model.invoke(question, rag={"k": 2})
    assert theirs.content == mine.content
    assert "rag" not in mine.response_metadata
    told = theirs.response_metadata["rag"]["documents"]
    assert [each["id"] for each in told] == [each.metadata["document_id"] for each in found]
    assert [each["cached_tokens"] > 0 for each in told] == [True, True]
    chunks = list(model.stream(question, rag={"k": 2}))
    whole = sum(chunks[1:], chunks[0])
    assert [each["id"] for each in whole.response_metadata["rag"]["documents"]] == [each["id"] for each in told]
    # Documents that a retriever found are known to the server as its own.
    known = model.invoke(question, documents=found, rag={"order": "cache"}).response_metadata["rag"]["documents"]
    assert {each["id"] for each in known} == {each["id"] for each in told}


def test_the_retriever(retriever: StemcacheRetriever, documents: list[Document], question: str) -> None:
    found = retriever.invoke(question)
    assert [each.id for each in found] == [each.metadata["document_id"] for each in found]
    best = found[0]
    assert (best.id, best.page_content) == (documents[1].id, documents[1].page_content)
    assert {**documents[1].metadata, "document_id": best.id, "score": best.metadata["score"]} == best.metadata
    assert best.metadata["score"] >= found[1].metadata["score"]
    assert asyncio.run(retriever.ainvoke(question)) == found
    assert [each.id for each in retriever.invoke(question, k=1)] == [best.id]
    assert [each.metadata["n"] for each in retriever.invoke(question, filter={"n": [0, 2]})] in ([0, 2], [2, 0])
    assert pickle.loads(pickle.dumps(retriever)).invoke(question) == found
    with pytest.raises(ServerAnswerError, match="k must be from 1 to 100") as refusal:
        retriever.invoke(question, k=1000)
    assert "refuses" in str(refusal.value)


def test_a_chain_in_place_of_stuffing(
    model: ChatStemcache, retriever: StemcacheRetriever, question: str, expected: Callable[..., str]
) -> None:
    chain = create_documents_chain(model, ChatPromptTemplate.from_messages([("user", "{input}")]))
    inputs = {"input": question, "context": retriever.invoke(question)}
    text = expected(question, texts(inputs["context"]))
    assert chain.invoke(inputs) == text
    pieces = list(chain.stream(inputs))
    assert len(pieces) > 1
    assert "".join(pieces) == text
    assert asyncio.run(chain.ainvoke(inputs)) == text
    with pytest.raises(ValueError, match="out of the prompt"):
        create_documents_chain(model, ChatPromptTemplate.from_template("From {context}: {input}"))


def test_an_agent_has_its_questions_documents(
    model: ChatStemcache, retriever: StemcacheRetriever, question: str, expected: Callable[..., str]
) -> None:
    agent = create_agent(model, middleware=[DocumentsMiddleware(retriever)])
    asked = {"messages": [HumanMessage(question)]}
    result = agent.invoke(asked)
    assert result["documents"] == retriever.invoke(question)
    assert result["messages"][-1].content == expected(question, texts(result["documents"]))
    assert asyncio.run(agent.ainvoke(asked))["messages"][-1].content == result["messages"][-1].content
    nobody_asks = agent.invoke({"messages": [AIMessage("The code is 7.")]})
    assert "documents" not in nobody_asks


def test_an_agent_retrieves_once_a_run(server: ServerProcess, tool_server: ServerProcess) -> None:
    """However often it calls its model; and a later call finds the earlier one's prompt cached."""
    queries = []

    class Counting(StemcacheRetriever):
        def _get_relevant_documents(self, query: str, **kwargs: Any) -> list[Document]:
            queries.append(query)
            return [Document("Gates are opened by their keepers. " * 30, metadata={"title": "Gates"})]

    limits = {"max_tokens": 100, "logit_bias": {8: 30, 99: 30}, "model_kwargs": {"tool_choice": "required"}}
    model = ChatStemcache(base_url=f"{tool_server.url}/v1", **(FIELDS | limits | {"model": "caller"}))
    agent = create_agent(model, [open_gate], middleware=[DocumentsMiddleware(Counting())])
    usages = []
    for update in agent.stream({"messages": [HumanMessage("Open it.")]}, stream_mode="updates"):
        for message in update.get("model", {}).get("messages", ()):
            usages.append(message.usage_metadata)
        if len(usages) == 2:  # a model that must call a tool never stops
            break
    assert queries == ["Open it."]
    assert usages[1]["input_token_details"]["cache_read"] > usages[0]["input_tokens"] - 64


def test_an_agents_model_must_take_documents(server: ServerProcess, retriever: StemcacheRetriever) -> None:
    other = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", **FIELDS)
    agent = create_agent(other, middleware=[DocumentsMiddleware(retriever)])
    with pytest.raises(TypeError, match="ChatStemcache"):
        agent.invoke({"messages": [HumanMessage("What?")]})


def test_it_is_loaded_as_it_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "openai's")
    monkeypatch.setenv("STEMCACHE_API_KEY", "ours")
    saved = dumpd(ChatStemcache(**FIELDS))
    assert "ours" not in str(saved)
    with warnings.catch_warnings(action="ignore"):  # it is in beta
        loaded = load(saved, allowed_objects=[ChatStemcache], valid_namespaces=["stemcache"], secrets_from_env=True)
    assert loaded.openai_api_key.get_secret_value() == "ours"
    assert loaded.asdict() == ChatStemcache(**FIELDS).asdict()


def test_no_openai_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "openai's")
    monkeypatch.delenv("STEMCACHE_API_KEY", raising=False)
    model = ChatStemcache(**FIELDS)
    assert (model.root_client.api_key, str(model.root_client.base_url)) == ("none", "http://127.0.0.1:8000/v1/")


def test_nobody_answers() -> None:
    with pytest.raises(ServerAnswerError, match="stemcache serve"):
        StemcacheRetriever(base_url="http://127.0.0.1:9").invoke("What?")
    with pytest.raises(ServerAnswerError, match="sent as JSON"):
        StemcacheRetriever(base_url="http://127.0.0.1:9").add_documents([Document("T", metadata={"a": object()})])
