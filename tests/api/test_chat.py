"""POST /v1/chat/completions through the openai client: shapes, streams, documents, answers equal to the engine's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from stemcache import Engine, SamplingParams
from stemcache.api.logprobs import token_name
from stemcache.engine.demo.facts import SYSTEM_PROMPT, FactDocument

SYSTEM = {"role": "system", "content": SYSTEM_PROMPT}


def ask(client: openai.OpenAI | openai.AsyncOpenAI, model: str, question: str, **fields: Any) -> Any:
    messages = [SYSTEM, {"role": "user", "content": question}]
    given: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "messages": messages} | fields
    return client.chat.completions.create(model=model, **given)


def expected_text(engine: Engine, question: str, documents: list[dict[str, Any]] | None = None) -> str:
    messages = [SYSTEM, {"role": "user", "content": question}]
    ids = engine.encode_chat(messages, documents=documents)
    [completion] = engine.generate([ids], SamplingParams(max_tokens=24, temperature=0))
    return completion.text


def test_shape(http: httpx.Client, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 3}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer.keys() == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    [choice] = answer["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"].keys() == {"role", "content", "refusal"}
    assert choice["message"]["role"] == "assistant"
    assert isinstance(answer["usage"]["prompt_tokens_details"]["cached_tokens"], int)


def test_answers_from_documents_are_the_engines(
    client: openai.OpenAI, model: str, engine: Engine, corpus: list[FactDocument], documents: list[dict[str, Any]]
) -> None:
    for fact in corpus[1].facts:
        answer = ask(client, model, fact.question, extra_body={"documents": documents})
        assert answer.choices[0].message.content == expected_text(engine, fact.question, documents)


def test_documents_change_the_prompt_and_plain_strings_are_documents(
    client: openai.OpenAI, model: str, engine: Engine, documents: list[dict[str, Any]]
) -> None:
    texts = [document["text"] for document in documents]
    answer = ask(client, model, "Hello?", extra_body={"documents": texts})
    messages = [SYSTEM, {"role": "user", "content": "Hello?"}]
    with_documents = engine.encode_chat(messages, documents=[{"title": "", "text": text} for text in texts])
    assert answer.usage.prompt_tokens == len(with_documents) > len(engine.encode_chat(messages))


def test_shared_documents_are_cached_for_the_next_question(
    client: openai.OpenAI, model: str, engine: Engine, corpus: list[FactDocument], documents: list[dict[str, Any]]
) -> None:
    first, second = corpus[0].facts[:2]
    cold = ask(client, model, first.question, extra_body={"documents": documents}).usage
    warm = ask(client, model, second.question, extra_body={"documents": documents}).usage
    shared = len(engine.encode_chat([SYSTEM], documents=documents, add_generation_prompt=False))
    assert warm.prompt_tokens_details.cached_tokens >= shared // 64 * 64 > cold.prompt_tokens_details.cached_tokens


def test_stream_begins_with_the_role_and_ends_with_the_reason(
    client: openai.OpenAI, model: str, engine: Engine
) -> None:
    chunks = list(ask(client, model, "Hello?", stream=True, n=2, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index in range(2):
        choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert choices[0].delta.model_dump(exclude_none=True) == {"role": "assistant", "content": ""}
        assert choices[-1].delta.model_dump(exclude_none=True) == {}
        assert [c.finish_reason for c in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1].finish_reason in ("stop", "length")
        assert "".join(c.delta.content or "" for c in choices) == expected_text(engine, "Hello?")


def test_stream_without_include_usage_has_no_usage(http: httpx.Client, model: str) -> None:
    body = {"model": model, "messages": [SYSTEM, {"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 3}
    lines = http.post("/v1/chat/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-2])


def test_logprobs_agree_between_stream_and_whole(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "seed": 1, "temperature": 1}
    whole = ask(client, model, "Hello?", **fields).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in ask(client, model, "Hello?", stream=True, **fields)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    for entry, other in zip(whole, streamed, strict=True):
        assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert len(entry.top_logprobs) == 2
        assert token_name(bytes(entry.bytes)) == entry.token
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


def test_logprobs_without_alternatives(client: openai.OpenAI, model: str) -> None:
    content = ask(client, model, "Hello?", logprobs=True, max_tokens=3).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in content] == [[]] * len(content)


def test_content_parts_are_joined_by_line_breaks(client: openai.OpenAI, model: str) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there?"}]
    in_parts = ask(client, model, "", messages=[{"role": "user", "content": parts}])
    in_one = ask(client, model, "", messages=[{"role": "user", "content": "Hello\nthere?"}])
    assert in_parts.choices[0].message.content == in_one.choices[0].message.content
    assert in_parts.usage.prompt_tokens == in_one.usage.prompt_tokens


def test_an_answer_given_back_as_it_came_is_accepted(client: openai.OpenAI, model: str) -> None:
    answer = ask(client, model, "Hello?").choices[0].message
    messages = [SYSTEM, {"role": "user", "content": "Hello?"}, answer, {"role": "user", "content": "And now?"}]
    following = ask(client, model, "", messages=messages)
    assert following.usage.prompt_tokens_details.cached_tokens > 0


def test_without_a_limit_the_answer_ends_by_itself_or_at_the_context(
    client: openai.OpenAI, model: str, engine: Engine
) -> None:
    fields: dict[str, Any] = {"max_tokens": openai.omit, "extra_body": {"ignore_eos": True}}
    word = len(engine.encode(" code"))
    usage = ask(client, model, " code" * ((engine.max_model_len - 100) // word), **fields).usage
    assert usage.completion_tokens > 0
    assert usage.prompt_tokens + usage.completion_tokens == engine.max_model_len


def test_both_names_of_the_limit(client: openai.OpenAI, model: str) -> None:
    extra = {"ignore_eos": True}
    usage = ask(client, model, "Hi", max_tokens=openai.omit, max_completion_tokens=5, extra_body=extra).usage
    assert usage.completion_tokens == 5
    assert ask(client, model, "Hi", max_tokens=5, max_completion_tokens=5, extra_body=extra).usage == usage


def test_the_async_client_streams(client: openai.OpenAI, model: str, engine: Engine) -> None:
    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none") as asynchronous:
            stream = await ask(asynchronous, model, "Hello?", stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(run()) == expected_text(engine, "Hello?")
