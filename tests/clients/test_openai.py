"""The openai package: everything that it offers over these routes, typed by its own models.

Runs once with the release that is installed; `test_openai_other_major.py` runs it again with the other one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal

import openai
import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel, Field

from stemcache import Engine, SamplingParams
from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import FactDocument, is_right

MODEL = MODEL_PATH.name
KEY = "alice-key-0123456789"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 24}


class Code(BaseModel):
    """What towers have."""

    tower: Literal["Velmora", "Tarn"]
    code: int = Field(ge=0, le=9999)


def question_of(document: FactDocument) -> list[dict[str, str]]:
    return [{"role": "user", "content": document.facts[0].question}]


def make_async(client: openai.OpenAI) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0)


def test_it_is_the_release_that_was_asked_for() -> None:
    assert openai.__version__.split(".")[0] == os.environ.get("OPENAI_MAJOR", openai.__version__.split(".")[0])


def test_the_page(run_from_page: Callable[..., str]) -> None:
    assert "7392" in run_from_page("openai")


def test_models(client: openai.OpenAI, engine: Engine) -> None:
    [listed] = client.models.list().data
    assert listed.id == MODEL
    assert client.models.retrieve(MODEL) == listed
    assert listed.model_dump()["max_model_len"] == engine.max_model_len


def test_completions_whole_streamed_and_async(
    client: openai.OpenAI, engine: Engine, corpus: list[FactDocument]
) -> None:
    prompt = corpus[0].text
    [expected] = engine.generate([prompt], SamplingParams(max_tokens=24, temperature=0))
    fields = GREEDY | {"prompt": prompt}
    assert client.completions.create(**fields).choices[0].text == expected.text
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected.text
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)

    async def both() -> tuple[str, str]:
        async with make_async(client) as asynchronous:
            whole = await asynchronous.completions.create(**fields)
            stream = await asynchronous.completions.create(**fields, stream=True)
            return whole.choices[0].text, "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(both()) == (expected.text, expected.text)


def test_chat_whole_streamed_and_async(
    client: openai.OpenAI, corpus: list[FactDocument], documents: list[dict[str, str]]
) -> None:
    fields = GREEDY | {"messages": question_of(corpus[1]), "extra_body": {"documents": documents}}
    answer = client.chat.completions.create(**fields)
    text = answer.choices[0].message.content
    assert answer.usage.prompt_tokens_details.cached_tokens < 64
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens >= 64

    async def both() -> tuple[str | None, str]:
        async with make_async(client) as asynchronous:
            whole = await asynchronous.chat.completions.create(**fields)
            stream = await asynchronous.chat.completions.create(**fields, stream=True)
            streamed = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content, "".join(streamed)

    assert asyncio.run(both()) == (text, text)


def test_answers_are_right(client: openai.OpenAI, corpus: list[FactDocument], documents: list[dict[str, str]]) -> None:
    """What all this is for: most answers come from the documents."""
    facts = [fact for document in corpus for fact in document.facts]
    answers = [
        client.chat.completions.create(
            **GREEDY, messages=[{"role": "user", "content": fact.question}], extra_body={"documents": documents}
        )
        for fact in facts
    ]
    right = [is_right(fact, a.choices[0].message.content) for fact, a in zip(facts, answers, strict=True)]
    assert sum(right) > len(facts) / 2


def test_the_stream_helper_puts_the_answer_together(
    client: openai.OpenAI, corpus: list[FactDocument], documents: list[dict[str, str]]
) -> None:
    # It refuses answers that were cut, so this one may end by itself.
    fields = GREEDY | {"messages": question_of(corpus[0]), "max_tokens": 200, "extra_body": {"documents": documents}}
    expected = client.chat.completions.create(**fields).choices[0].message.content
    with client.chat.completions.stream(**fields) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        assert "".join(deltas) == stream.get_final_completion().choices[0].message.content == expected


def test_parse_gives_the_callers_own_type(client: openai.OpenAI, corpus: list[FactDocument]) -> None:
    fields = {"model": MODEL, "messages": question_of(corpus[0]), "temperature": 0, "max_tokens": 100}
    parsed = client.chat.completions.parse(**fields, response_format=Code).choices[0].message.parsed
    assert isinstance(parsed, Code)
    with client.chat.completions.stream(**fields, response_format=Code) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed

    async def asynchronous() -> Code | None:
        async with make_async(client) as made:
            return (await made.chat.completions.parse(**fields, response_format=Code)).choices[0].message.parsed

    assert asyncio.run(asynchronous()) == parsed


def test_tools_are_called_with_the_callers_own_types(tool_server: ServerProcess, corpus: list[FactDocument]) -> None:
    fields = {"model": "caller", "messages": question_of(corpus[0]), "temperature": 0, "max_tokens": 200}
    fields |= {"tools": [pydantic_function_tool(Code)], "tool_choice": "required", "parallel_tool_calls": False}
    with openai.OpenAI(base_url=f"{tool_server.url}/v1", api_key="none") as client:
        choice = client.chat.completions.parse(**fields).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        [call] = choice.message.tool_calls
        assert call.function.name == "Code"
        assert isinstance(call.function.parsed_arguments, Code)
        with client.chat.completions.stream(**fields) as stream:
            [streamed] = stream.get_final_completion().choices[0].message.tool_calls
        assert streamed.function.parsed_arguments == call.function.parsed_arguments


def test_logprobs_of_both_routes_agree(client: openai.OpenAI, engine: Engine, corpus: list[FactDocument]) -> None:
    messages = question_of(corpus[0])
    chat = client.chat.completions.create(**GREEDY, messages=messages, logprobs=True, top_logprobs=2)
    text = client.completions.create(**GREEDY, prompt=engine.encode_chat(messages), logprobs=2)
    of_chat, of_text = chat.choices[0].logprobs.content, text.choices[0].logprobs
    assert [entry.logprob for entry in of_chat] == pytest.approx(of_text.token_logprobs, abs=1e-4)
    assert all(len(entry.top_logprobs) == 2 and entry.bytes for entry in of_chat)


def test_a_request_has_an_id(client: openai.OpenAI) -> None:
    assert client.models.list()._request_id


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": -1}, "temperature", None),
        ({"extra_body": {"colour": "red"}}, "colour", "unsupported_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"max_tokens": 10**6}, None, "context_length_exceeded"),
    ],
)
def test_a_bad_request_names_its_field(
    client: openai.OpenAI, fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**({**GREEDY, "messages": [{"role": "user", "content": "Hi"}]} | fields))
    assert param is None or caught.value.param == param
    assert code is None or caught.value.code == code


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "Hi"}])
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that wants a key and lets one request wait."""
    keys = tmp_path_factory.mktemp("guarded") / "keys"
    keys.write_text(f"alice {KEY}\n")
    keys.chmod(0o600)
    with ServerProcess("--api-keys", str(keys), "--max-queue", "1", "--pool-bytes", "4MiB") as process:
        process.wait_until_ready(timeout=600)
        yield f"{process.url}/v1"


def test_a_wrong_key(guarded: str) -> None:
    with openai.OpenAI(base_url=guarded, api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=guarded, api_key=KEY) as client:
        assert client.models.list().data


def test_a_full_queue(guarded: str) -> None:
    """One request whose many prompts cannot all run at once fills the queue; then the next one is told when to come."""
    with openai.OpenAI(base_url=guarded, api_key=KEY, max_retries=0) as client:
        fields: dict[str, Any] = {"model": MODEL, "max_tokens": 500, "extra_body": {"ignore_eos": True}}
        with client.completions.create(**fields, prompt=["The code"] * 200, stream=True) as busy:
            next(iter(busy))
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**fields, prompt="The code")
        assert int(caught.value.response.headers["retry-after"]) >= 1
