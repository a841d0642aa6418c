"""A server that says that it is idle has nothing left to do for anybody who has an answer."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest

from stemcache import Engine, SamplingParams
from stemcache.api import follow_up
from stemcache.api.server import create_app
from stemcache.engine.demo import MODEL_PATH

IDLE = {"status": "ok", "running": 0, "waiting": 0}
CHAT = {"messages": [{"role": "user", "content": "What has the tower? " * 9}], "max_tokens": 9, "temperature": 0}


def load() -> Engine:
    return Engine.load(MODEL_PATH, dtype="float32", pool_bytes=64 << 20)


def test_a_conversation_to_be_read_for_its_next_turn_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        may_read = asyncio.Event()
        encode = follow_up.encode_messages

        async def encode_late(*arguments: Any, **options: Any) -> list[int]:
            await may_read.wait()
            return await encode(*arguments, **options)

        monkeypatch.setattr(follow_up, "encode_messages", encode_late)
        transport = httpx.ASGITransport(create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            usage = (await client.post("/v1/chat/completions", json=CHAT)).json()["usage"]
            await asyncio.to_thread(engine.stats)  # the answer's sequence has ended
            assert (await client.get("/health")).json() == IDLE | {"waiting": 1}
            may_read.set()
            while (await client.get("/health")).json() != IDLE:
                await asyncio.sleep(0.001)
        read = engine.activity().prompt_tokens - usage["prompt_tokens"]
        assert read > usage["prompt_tokens"]  # as the next turn brings it

    with load() as engine:
        asyncio.run(asyncio.wait_for(run(), 120))


def test_a_request_waits_while_a_step_keeps_the_engine_from_seeing_it() -> None:
    step_runs, step_may_end = threading.Event(), threading.Event()

    def long_step() -> None:
        step_runs.set()
        step_may_end.wait()

    with load() as engine:
        step = threading.Thread(target=engine._loop.call, args=(long_step,))
        step.start()
        try:
            assert step_runs.wait(120)
            stream = engine.submit(engine.encode("The code of"), SamplingParams(max_tokens=3, ignore_eos=True))
            assert (engine.activity().running, engine.activity().waiting) == (0, 1)
        finally:
            step_may_end.set()
            step.join()
        assert sum(len(delta.token_ids) for delta in stream) == 3
        assert (engine.stats().running, engine.stats().waiting) == (0, 0)
        assert (engine.activity().running, engine.activity().waiting) == (0, 0)
