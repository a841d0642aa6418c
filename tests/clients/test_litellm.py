"""litellm, as a library: its two ways to speak to a server of one's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from stemcache import Engine, SamplingParams
from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import FactDocument

litellm = pytest.importorskip("litellm", reason="make test-clients installs it")

pytestmark = pytest.mark.filterwarnings("default")  # pydantic warns of litellm's own models
MODEL = MODEL_PATH.name
PROVIDERS = pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])


@pytest.fixture
def fields(server: ServerProcess) -> dict[str, Any]:
    return {"api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 24, "num_retries": 0}


def asked(provider: str, corpus: list[FactDocument], documents: list[dict[str, str]], fact: int = 0) -> dict[str, Any]:
    messages = [{"role": "user", "content": corpus[0].facts[fact].question}]
    return {"model": f"{provider}/{MODEL}", "messages": messages, "extra_body": {"documents": documents}}


def test_the_page(run_from_page: Callable[..., str]) -> None:
    assert "7392" in run_from_page("litellm")


@PROVIDERS
def test_chat_whole_streamed_and_async(
    fields: dict[str, Any],
    engine: Engine,
    corpus: list[FactDocument],
    documents: list[dict[str, str]],
    provider: str,
) -> None:
    request = asked(provider, corpus, documents)
    ids = engine.encode_chat(request["messages"], documents=documents)
    [expected] = engine.generate([ids], SamplingParams(max_tokens=24, temperature=0))
    assert litellm.completion(**request, **fields).choices[0].message.content == expected.text
    chunks = litellm.completion(**request, **fields, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    answer = asyncio.run(litellm.acompletion(**request, **fields))
    assert answer.choices[0].message.content == expected.text


@PROVIDERS
def test_usage_tells_what_was_cached(
    fields: dict[str, Any], corpus: list[FactDocument], documents: list[dict[str, str]], provider: str
) -> None:
    cold, warm = (litellm.completion(**asked(provider, corpus, documents, fact), **fields).usage for fact in (0, 1))
    assert cold.prompt_tokens_details.cached_tokens < 64
    assert warm.prompt_tokens_details.cached_tokens >= 64
    stream = litellm.completion(
        **asked(provider, corpus, documents), **fields, stream=True, stream_options={"include_usage": True}
    )
    [usage] = [chunk.usage for chunk in stream if getattr(chunk, "usage", None)]
    assert usage.prompt_tokens_details.cached_tokens >= 64


def test_text_completion(fields: dict[str, Any], engine: Engine, corpus: list[FactDocument]) -> None:
    prompt = corpus[0].text
    [expected] = engine.generate([prompt], SamplingParams(max_tokens=24, temperature=0))
    request = {"model": f"text-completion-openai/{MODEL}", "prompt": prompt, **fields}
    assert litellm.text_completion(**request).choices[0].text == expected.text
    streamed = litellm.text_completion(**request, stream=True)
    assert "".join(chunk.choices[0].text or "" for chunk in streamed) == expected.text


@PROVIDERS
def test_errors_are_those_of_litellm(
    fields: dict[str, Any], corpus: list[FactDocument], documents: list[dict[str, str]], provider: str
) -> None:
    request = asked(provider, corpus, documents)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**(request | {"model": f"{provider}/gpt-4"}), **fields)
    with pytest.raises(litellm.BadRequestError, match="colour"):
        litellm.completion(**(request | {"extra_body": {"colour": "red"}}), **fields)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**(request | {"messages": [{"role": "user", "content": "word " * 5000}]}), **fields)
