"""Many clients at once, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from typing import Any

import httpx
import openai
from waiting import until

from stemcache import Engine, SamplingParams
from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo.facts import random_corpus

LONG: dict[str, Any] = {"prompt": "The code of", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
SHORT = LONG | {"max_tokens": 100}


def running(http: httpx.Client) -> int:
    return int(http.get("/health").json()["running"])


def assert_frees_its_slots(http: httpx.Client) -> None:
    """A request of 100 tokens that starts now ends long before one of 1,900 does, unless that one was cancelled."""
    assert http.post("/v1/completions", json=SHORT).json()["usage"]["completion_tokens"] == 100
    assert http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_a_client_that_leaves_its_stream_frees_the_request(http: httpx.Client, server: ServerProcess) -> None:
    with (
        httpx.Client(base_url=server.url, trust_env=False, timeout=60) as leaver,
        leaver.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 4}) as response,
    ):
        lines = response.iter_lines()  # kept: httpx closes the connection with the iterator
        next(lines)
        until(lambda: running(http) == 4)
    assert_frees_its_slots(http)


def test_a_client_that_leaves_before_its_answer_frees_the_request(http: httpx.Client, server: ServerProcess) -> None:
    body = json.dumps(LONG | {"prompt": ["a", "b"]}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as leaver:
        leaver.sendall(head.encode() + body)
        until(lambda: running(http) == 2)
    assert_frees_its_slots(http)


def test_thirty_two_streams_at_once_give_the_engines_answers(server: ServerProcess, model: str, engine: Engine) -> None:
    rng = random.Random(11)
    corpus = random_corpus(rng, 4)
    documents = [document.as_template_document() for document in corpus]
    questions = [rng.choice(rng.choice(corpus).facts).question for _ in range(32)]

    async def ask(client: openai.AsyncOpenAI, question: str) -> str:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=20,
            stream=True,
            extra_body={"documents": documents, "ignore_eos": True},
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, question) for question in questions))

    prompts = [engine.encode_chat([{"role": "user", "content": q}], documents=documents) for q in questions]
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    assert asyncio.run(ask_all()) == [completion.text for completion in engine.generate(prompts, params)]
