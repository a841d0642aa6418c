"""LangChain's `ChatOpenAI` and `OpenAI`: the way most RAG pipelines will come here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from stemcache import Engine, SamplingParams
from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import FactDocument

pytest.importorskip("langchain_openai", reason="make test-clients installs it")

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

FIELDS: dict[str, Any] = {"model": MODEL_PATH.name, "api_key": "none", "temperature": 0, "max_retries": 0}


class Code(BaseModel):
    """The code of a tower."""

    tower: Literal["Velmora", "Tarn"]
    code: int = Field(ge=0, le=9999)


@tool
def look_up(tower: Literal["Velmora", "Tarn"], floor: Literal[1, 2]) -> str:
    """What is on a floor of a tower."""
    return f"Nothing is on floor {floor} of {tower}."


@pytest.fixture
def model(server: ServerProcess, documents: list[dict[str, str]]) -> ChatOpenAI:
    """Each question is asked about the documents."""
    extra = {"documents": documents}
    return ChatOpenAI(base_url=f"{server.url}/v1", max_tokens=24, stream_usage=True, extra_body=extra, **FIELDS)


@pytest.fixture
def questions(corpus: list[FactDocument]) -> list[str]:
    return [fact.question for document in corpus for fact in document.facts]


def test_the_page(run_from_page: Callable[..., str]) -> None:
    assert "7392" in run_from_page("LangChain")


def test_invoke_stream_and_async_say_what_the_engine_says(
    model: ChatOpenAI, engine: Engine, questions: list[str], documents: list[dict[str, str]]
) -> None:
    ids = engine.encode_chat([{"role": "user", "content": questions[0]}], documents=documents)
    [expected] = engine.generate([ids], SamplingParams(max_tokens=24, temperature=0))
    answer = model.invoke(questions[0])
    assert answer.content == expected.text
    assert answer.response_metadata["finish_reason"] == expected.finish_reason
    assert "".join(str(chunk.content) for chunk in model.stream(questions[0])) == expected.text

    async def both() -> tuple[object, str]:
        whole = await model.ainvoke(questions[0])
        return whole.content, "".join([str(chunk.content) async for chunk in model.astream(questions[0])])

    assert asyncio.run(both()) == (expected.text, expected.text)


def test_usage_tells_what_was_cached_whole_and_streamed(model: ChatOpenAI, questions: list[str]) -> None:
    cold = model.invoke(questions[0]).usage_metadata
    assert cold["input_token_details"]["cache_read"] < 64
    warm = model.invoke(questions[1]).usage_metadata
    assert warm["input_token_details"]["cache_read"] >= 64
    chunks = list(model.stream(questions[1]))
    streamed = sum(chunks[1:], chunks[0]).usage_metadata
    assert streamed["input_token_details"]["cache_read"] >= 64
    assert {name: streamed[name] for name in ("input_tokens", "output_tokens", "total_tokens")} == {
        name: warm[name] for name in ("input_tokens", "output_tokens", "total_tokens")
    }


def test_a_batch_says_what_single_calls_say(model: ChatOpenAI, questions: list[str]) -> None:
    assert [answer.content for answer in model.batch(questions)] == [
        model.invoke(question).content for question in questions
    ]


def test_a_conversation_goes_on(model: ChatOpenAI, questions: list[str]) -> None:
    messages: list[Any] = [SystemMessage("You answer questions."), HumanMessage(questions[0])]
    answer = model.invoke(messages)
    assert isinstance(answer, AIMessage)
    following = model.invoke([*messages, answer, HumanMessage(questions[1])])
    assert following.usage_metadata["input_token_details"]["cache_read"] > 0


def test_structured_output(model: ChatOpenAI, questions: list[str]) -> None:
    asking = model.model_copy(update={"max_tokens": 100}).with_structured_output(Code, method="json_schema")
    assert isinstance(asking.invoke(questions[0]), Code)


def test_tools(tool_server: ServerProcess, questions: list[str]) -> None:
    fields = FIELDS | {"model": "caller", "max_tokens": 200}
    model = ChatOpenAI(base_url=f"{tool_server.url}/v1", stream_usage=True, **fields)
    # Strict: without it a schema allows further arguments, and the demo model, which knows no JSON, goes on and on.
    calling = model.bind_tools([look_up], tool_choice="required", parallel_tool_calls=False, strict=True)
    [call] = calling.invoke(questions[0]).tool_calls
    assert (call["name"], set(call["args"])) == ("look_up", {"tower", "floor"})
    chunks = list(calling.stream(questions[0]))
    [streamed] = sum(chunks[1:], chunks[0]).tool_calls
    assert streamed["args"] == call["args"]
    assert look_up.invoke(call).content.startswith("Nothing is on floor")
    structured = model.with_structured_output(Code, method="function_calling", strict=True)
    assert isinstance(structured.invoke(questions[0]), Code)


def test_text_completions(server: ServerProcess, engine: Engine, corpus: list[FactDocument]) -> None:
    model = OpenAI(base_url=f"{server.url}/v1", max_tokens=24, **FIELDS)
    texts = [document.text for document in corpus]
    expected = [c.text for c in engine.generate(texts, SamplingParams(max_tokens=24, temperature=0))]
    assert [model.invoke(text) for text in texts] == expected
    assert model.batch(texts) == expected
    assert "".join(model.stream(texts[0])) == expected[0]
