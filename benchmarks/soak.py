"""A soak: requests of which a third go away midway, against a real server; then the store must be sound.

    python benchmarks/soak.py [--requests 1000] [--pairs 60]

Prints the figures and ends with 1 if the store is not sound, or something is still held. Memory and the tenants' times
to first token are printed for people to judge: machines differ.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import httpx
import psutil

from stemcache.api.keys import Keyring
from stemcache.api.server import create_app
from stemcache.api.server_process import free_port
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.engine import Engine

KEYS = {"soak-key-of-alice-0123": "alice", "soak-key-of-bob-012345": "bob"}
ALICE, BOB = KEYS
AT_A_TIME = 12
SEED = 3
POOL_BYTES = 32 << 20  # small, so that chunks are evicted all the time


@dataclass
class Soaked:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    resident_bytes: list[int] = field(default_factory=list)


async def soak(url: str, requests: int, *, server: psutil.Process | None = None) -> Soaked:
    """Send `requests`, every third of which leaves; returns when the server has nothing left to do."""
    rng, result, free = random.Random(SEED), Soaked(), asyncio.Semaphore(AT_A_TIME)
    prefixes = [[rng.randrange(5, 500) for _ in range(rng.randrange(60, 300))] for _ in range(8)]

    async def one(number: int, client: httpx.AsyncClient) -> None:
        body: dict[str, Any] = {
            "prompt": rng.choice(prefixes) + [rng.randrange(5, 500) for _ in range(rng.randrange(1, 40))],
            "max_tokens": rng.randrange(2, 24),
            "temperature": rng.choice([0, 1]),
            "n": rng.choice([1, 1, 1, 3]),
            "stream": rng.random() < 0.5,
            "ignore_eos": True,
        }
        leaves = number % 3 == 0
        headers = {"Authorization": f"Bearer {rng.choice([ALICE, BOB])}"}
        async with free:
            leave = _leave_midway(client, body, headers, rng) if leaves else _stay(client, body, headers)
            result.outcomes[await leave] += 1
        if server is not None and number % max(1, requests // 20) == 0:
            result.resident_bytes.append(server.memory_info().rss)

    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=300) as client:
        await asyncio.gather(*(one(number, client) for number in range(requests)))
        while (health := (await client.get("/health")).json())["running"] or health["waiting"]:
            await asyncio.sleep(0.02)
    return result


async def _stay(client: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str]) -> str:
    response = await client.post("/v1/completions", json=body, headers=headers)
    ended = not body["stream"] or response.text.endswith("data: [DONE]\n\n")
    return "answered" if response.is_success and ended else f"status {response.status_code}"


async def _leave_midway(
    client: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str], rng: random.Random
) -> str:
    """Go away after some chunks of a stream, or after a moment of waiting for a whole answer."""
    body = body | {"max_tokens": 400, "min_tokens": 200, "ignore_eos": False}  # so that text is coming when they go
    if not body["stream"]:
        task = asyncio.create_task(client.post("/v1/completions", json=body, headers=headers))
        await asyncio.sleep(rng.random() * 0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return "left"
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        chunks, wanted = response.aiter_lines(), rng.randrange(0, 8)
        for _ in range(wanted):
            await anext(chunks)
    return "left"


async def first_token_times(url: str, pairs: int) -> tuple[list[float], list[float]]:
    """Bob's times to first token in seconds: for prompts that Alice has cached, and for prompts that nobody has."""
    rng = random.Random(SEED)
    cached: list[float] = []
    unknown: list[float] = []

    async def ttft(client: httpx.AsyncClient, prompt: Sequence[int], key: str) -> float:
        start = time.perf_counter()
        body = {"prompt": prompt, "max_tokens": 1}
        (await client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})).raise_for_status()
        return time.perf_counter() - start

    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=300) as client:
        for _ in range(pairs):
            hers, nobodys = ([rng.randrange(5, 500) for _ in range(600)] for _ in range(2))
            await ttft(client, hers, ALICE)
            asks = [(hers, cached), (nobodys, unknown)]
            rng.shuffle(asks)  # or the second of the two would have what the first one warmed
            for prompt, times in asks:
                times.append(await ttft(client, prompt, BOB))
    return cached, unknown


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the rank-sum test by its normal approximation, which holds from about 20 values a side."""
    above = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    mean, deviation = len(a) * len(b) / 2, math.sqrt(len(a) * len(b) * (len(a) + len(b) + 1) / 12)
    return 2 * (1 - NormalDist().cdf(abs(above - mean) / deviation))


def serve(port: int) -> None:
    """The server: the product's application, and one route more, on loopback only, that checks the store."""
    import uvicorn

    with Engine.load(MODEL_PATH, dtype="float32", pool_bytes=POOL_BYTES) as engine:
        app = create_app(engine, keyring=Keyring(KEYS, b"soak"))

        @app.get("/check")
        def check() -> dict[str, int]:
            engine.check()
            stats = engine.stats()
            return {
                "leases": stats.store.leases,
                "claims": stats.store.claims,
                "private chunks": stats.store.private_chunks,
                "evicted chunks": stats.store.evicted_chunks,
                "preemptions": stats.preemptions,
            }

        uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=60, help="prompts of each kind for the times to first token")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return 0
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    child = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
    try:
        return _soak_and_print(url, psutil.Process(child.pid), options)
    finally:
        child.terminate()
        child.wait()


def _soak_and_print(url: str, server: psutil.Process, options: argparse.Namespace) -> int:
    _wait_until_ready(url, server)
    asyncio.run(soak(url, 60))  # what torch and the allocator take once
    start = time.monotonic()
    result = asyncio.run(soak(url, options.requests, server=server))
    print(f"{options.requests} requests in {time.monotonic() - start:.0f} s: {dict(result.outcomes)}")
    sizes = [size / 2**20 for size in result.resident_bytes]
    middle = len(sizes) // 2
    early, late = statistics.mean(sizes[:middle]), statistics.mean(sizes[middle:])
    print(f"memory: {sizes[0]:.1f} MiB at first, {sizes[-1]:.1f} at last; the halves' means {early:.1f}, {late:.1f}")
    checked = httpx.get(f"{url}/check", headers={"Authorization": f"Bearer {ALICE}"}, trust_env=False, timeout=60)
    print(f"check(): {'sound' if checked.is_success else checked.text}; {checked.json()}")
    cached, unknown = asyncio.run(first_token_times(url, options.pairs))
    print(
        f"TTFT of a prompt that another tenant has cached: median {1000 * statistics.median(cached):.1f} ms; "
        f"that nobody has: {1000 * statistics.median(unknown):.1f} ms; "
        f"Mann-Whitney p = {mann_whitney(cached, unknown):.2f} ({options.pairs} of each)"
    )
    held = ("leases", "claims", "private chunks")
    sound = checked.is_success and not any(checked.json()[name] for name in held)
    return 0 if sound and set(result.outcomes) == {"answered", "left"} else 1


def _wait_until_ready(url: str, server: psutil.Process) -> None:
    with httpx.Client(trust_env=False) as client:
        while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
            try:
                if client.get(f"{url}/health").is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
    raise SystemExit("the server ended before it was ready")


if __name__ == "__main__":
    sys.exit(main())
