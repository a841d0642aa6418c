"""What is too much is refused in time: bodies, queues, waiting, and the clock."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import torch

from stemcache import Engine
from stemcache.api.admission import Throughput
from stemcache.api.drain import Drain
from stemcache.api.keys import Keyring
from stemcache.api.limits import Limits
from stemcache.api.server import create_app
from stemcache.engine.checkpoint import load_checkpoint
from stemcache.engine.demo import MODEL_PATH

LONG: dict[str, Any] = {"prompt": "The code of", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
SHORT = LONG | {"max_tokens": 1}
KEYS = {"alice-key-0123456789": "alice", "bob-key-0123456789ab": "bob"}
ALICE, BOB = ({"Authorization": f"Bearer {key}"} for key in KEYS)


@pytest.fixture(scope="module")
def narrow() -> Iterator[Engine]:
    """An engine that works on one sequence at a time."""
    checkpoint = load_checkpoint(MODEL_PATH, device=torch.device("cpu"), dtype="float32")
    with Engine(checkpoint, "narrow", pool_bytes=64 << 20, max_running=1) as engine:
        yield engine
        engine.check()
        assert engine.stats().store.leases == 0


@asynccontextmanager
async def connect(engine: Engine, limits: Limits, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(engine, limits=limits, **options))
    async with httpx.AsyncClient(transport=transport, base_url="http://app", timeout=None) as client:
        yield client


async def until(engine: Engine, running: int, waiting: int) -> None:
    while (engine.activity().running, engine.activity().waiting) != (running, waiting):
        await asyncio.sleep(0.01)


async def cancel(*tasks: asyncio.Task[httpx.Response]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("announced", [True, False])
def test_a_large_body_is_refused_before_it_is_read(engine: Engine, announced: bool) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b" " * 1000

    async def run() -> httpx.Response:
        async with connect(engine, Limits(body_bytes=10_000)) as client:
            headers = {"Content-Length": "9" * 5000} if announced else {}
            good = json.dumps(SHORT).encode()
            assert (await client.post("/v1/completions", content=good.ljust(10_000))).status_code == 400  # no JSON type
            small = {"Content-Type": "application/json"}
            assert (await client.post("/v1/completions", content=good.ljust(10_000), headers=small)).is_success
            return await client.post("/v1/completions", content=endless(), headers=headers)

    response = asyncio.run(run())
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert taken == 0 if announced else taken <= 12


def test_a_full_queue_is_429_for_its_tenant_only(narrow: Engine) -> None:
    async def run() -> None:
        async with connect(narrow, Limits(queue=1), keyring=Keyring(KEYS, b"")) as client:
            post = client.post
            tasks = [asyncio.create_task(post("/v1/completions", json=LONG, headers=ALICE))]
            await until(narrow, 1, 0)
            tasks.append(asyncio.create_task(post("/v1/completions", json=LONG, headers=ALICE)))
            await until(narrow, 1, 1)
            refused = await post("/v1/completions", json=SHORT, headers=ALICE)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            tasks.append(asyncio.create_task(post("/v1/completions", json=LONG, headers=BOB)))
            await until(narrow, 1, 2)
            await cancel(*tasks)
            await until(narrow, 0, 0)
            assert (await post("/v1/completions", json=SHORT, headers=ALICE)).is_success

    asyncio.run(run())


def test_tenants_take_turns_and_priority_rules_within_one(narrow: Engine) -> None:
    """Alice was first with four requests; Bob's one is not behind them all, and her last comes before her others."""
    finished: list[str] = []

    async def run() -> None:
        async with connect(narrow, Limits(), keyring=Keyring(KEYS, b"")) as client:

            async def ask(name: str, who: dict[str, str], **fields: Any) -> None:
                body = SHORT | {"prompt": [9] * 100 + [len(name)], "max_tokens": 5} | fields
                assert (await client.post("/v1/completions", json=body, headers=who)).is_success
                finished.append(name)

            first = asyncio.create_task(ask("first", ALICE, prompt=[8] * 100, max_tokens=300))
            await until(narrow, 1, 0)
            others = []
            for waiting, (name, who, priority) in enumerate(
                [("a", ALICE, 0), ("aa", ALICE, 0), ("urgent", ALICE, -1), ("bob", BOB, 5)], start=1
            ):
                others.append(asyncio.create_task(ask(name, who, priority=priority)))
                await until(narrow, 1, waiting)
            await asyncio.gather(first, *others)

    asyncio.run(run())
    assert finished == ["first", "bob", "urgent", "a", "aa"]


def test_out_of_time_is_an_error_and_frees_everything(narrow: Engine) -> None:
    async def run() -> tuple[httpx.Response, httpx.Response]:
        async with connect(narrow, Limits(seconds=0.2)) as client:
            # The second one waits for the first, and runs out of time without having been started.
            whole, stream = await asyncio.gather(
                client.post("/v1/completions", json=LONG | {"n": 2}),
                client.post("/v1/completions", json=LONG | {"stream": True}),
            )
            await until(narrow, 0, 0)
            return whole, stream

    whole, stream = asyncio.run(run())
    assert whole.status_code == 504
    assert whole.headers["x-should-retry"] == "false"
    assert whole.json()["error"]["code"] == "request_timeout"
    *_, last, done, end = stream.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"


def test_a_draining_server_finishes_and_takes_nothing_new(narrow: Engine) -> None:
    drain = Drain()

    async def run() -> tuple[httpx.Response, ...]:
        async with connect(narrow, Limits(), drain=drain) as client:
            task = asyncio.create_task(client.post("/v1/completions", json=LONG | {"max_tokens": 200}))
            await until(narrow, 1, 0)
            drain.begin()
            assert not drain.is_done
            refused = await client.post("/v1/completions", json=SHORT)
            health, metrics = await client.get("/health"), await client.get("/metrics")
            return await task, refused, health, metrics

    finished, refused, health, metrics = asyncio.run(run())
    assert finished.json()["usage"]["completion_tokens"] == 200
    for each in (refused, health):
        assert each.status_code == 503
        assert each.json()["error"]["code"] == "shutting_down"
    assert metrics.is_success
    assert drain.is_done


def test_health_does_not_wait_for_the_running_step(narrow: Engine) -> None:
    """The engine's thread is held up between two steps; whoever asked it anything would wait for ever."""

    async def run() -> httpx.Response:
        async with connect(narrow, Limits()) as client:
            return await client.get("/health")

    release = threading.Event()
    holder = threading.Thread(target=lambda: narrow._loop.call(release.wait))
    holder.start()
    try:
        assert asyncio.run(run()).json()["status"] == "ok"
    finally:
        release.set()
        holder.join()


def test_retry_after_follows_what_was_served_lately() -> None:
    now = 0.0
    throughput = Throughput(lambda: now)
    assert throughput.seconds_for(100) == Throughput.UNKNOWN
    for _ in range(10):  # one every two seconds
        now += 2
        throughput.count()
    assert throughput.seconds_for(1) == 2
    assert throughput.seconds_for(10) == 20
    assert throughput.seconds_for(10_000) == Throughput.LONGEST
    assert throughput.seconds_for(0) == Throughput.SHORTEST
    now = 1000.0  # nothing has ended for a long time
    assert throughput.seconds_for(1) == Throughput.LONGEST
