"""What clients are told when the engine is gone: before, and in the middle of, their answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from stemcache import Engine
from stemcache.api.server import create_app
from stemcache.engine.demo import MODEL_PATH

LONG = {"prompt": "The code of", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}


def load() -> Engine:
    return Engine.load(MODEL_PATH, dtype="float32", pool_bytes=64 << 20)


@asynccontextmanager
async def connect(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        yield client


def test_a_closed_engine_is_503_everywhere() -> None:
    async def run() -> list[httpx.Response]:
        async with connect(engine) as client:
            return [
                await client.get("/health"),
                await client.post("/v1/completions", json=LONG),
                await client.post("/v1/completions", json=LONG | {"stream": True}),
            ]

    with load() as engine:
        pass
    for response in asyncio.run(run()):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_closed"
        assert response.json()["error"]["type"] == "server_error"


def test_an_engine_that_closes_midway_ends_answers_with_an_error() -> None:
    async def run() -> tuple[httpx.Response, httpx.Response]:
        async with connect(engine) as client:
            whole = asyncio.create_task(client.post("/v1/completions", json=LONG))
            stream = asyncio.create_task(client.post("/v1/completions", json=LONG | {"stream": True}))
            while (await client.get("/health")).json()["running"] < 2:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(engine.close)
            return await whole, await stream

    with load() as engine:
        whole, stream = asyncio.run(run())
    assert whole.status_code == 503
    assert stream.status_code == 200
    *_, last, done, end = stream.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_closed"
