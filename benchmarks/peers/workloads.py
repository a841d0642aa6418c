"""What is asked: seeded workloads, each a function that drives one server and gives back its figures.

Invariant: what is sent depends on the seed and the sizes only, except that a conversation goes on with the server's own
answers. A round has texts of its own, so its first requests are cold on every server. Answers have several words also
where only the first is timed: transformers caches nothing of a request that ends with its first token.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import accumulate

from peers.checkpoint import text_of
from peers.drive import Client
from peers.server import Server

Figures = dict[str, list[float]]
"""Samples by what was measured; the names say the unit: seconds where there is none, or tokens/s, or MB."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens, requests and words of all workloads. A smoke run has smaller ones."""

    system: int = 2048
    private: int = 32
    words: int = 8
    asks: int = 3
    at_once: tuple[int, ...] = (1, 8, 32)
    documents: int = 24
    document: int = 256
    retrieved: int = 4
    questions: int = 8
    conversations: int = 3
    turns: int = 4
    alone: int = 512
    samples: int = 8


QUICK = Sizes(
    system=200, words=4, asks=2, at_once=(1, 4), documents=6, document=40, retrieved=2, questions=3,
    conversations=2, turns=2, alone=60, samples=3,
)  # fmt: skip


async def system_prompt(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    """One long system prompt, many short questions."""
    system = text_of(rng, sizes.system)
    figures: Figures = {"TTFT cold": [(await client.ask(system + text_of(rng, sizes.private), sizes.words)).ttft]}
    figures["TTFT warm"] = []
    for _ in range(sizes.asks):
        figures["TTFT warm"].append((await client.ask(system + text_of(rng, sizes.private), sizes.words)).ttft)
    for n in sizes.at_once:
        before = server.memory_bytes()
        burst = await client.burst([system + text_of(rng, sizes.private) for _ in range(n)], sizes.words)
        figures[f"tokens/s, {n} at once"] = [burst.tokens_per_second]
        figures[f"last TTFT of {n}"] = [burst.last_first_token]
        figures["MB a sharer"] = [(server.memory_bytes() - before) / n / 1e6]
    return figures


async def documents(client: Client, rng: random.Random, sizes: Sizes, *, shuffled: bool) -> Figures:
    """Questions over documents whose popularity is Zipf's; best first, as retrieved, or in random order."""
    system = text_of(rng, 64)
    corpus = [text_of(rng, sizes.document) for _ in range(sizes.documents)]
    weights = list(accumulate(1 / rank for rank in range(1, sizes.documents + 1)))
    times = []
    for _ in range(sizes.questions):
        found: dict[int, None] = {}
        while len(found) < sizes.retrieved:
            found[rng.choices(range(sizes.documents), cum_weights=weights)[0]] = None
        order = rng.sample(list(found), len(found)) if shuffled else sorted(found)
        prompt = system + "".join(corpus[i] for i in order) + text_of(rng, sizes.private)
        times.append((await client.ask(prompt, sizes.words)).ttft)
    return {"TTFT": times}


async def rag_retrieval_order(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    """Documents in one order for all: the more popular first."""
    return await documents(client, rng, sizes, shuffled=False)


async def rag_shuffled(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    """The same kind of request with the documents in random order."""
    return await documents(client, rng, sizes, shuffled=True)


async def conversations(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    """Several conversations that take turns; each turn's prompt is all that was said, and a new question."""
    system = text_of(rng, sizes.alone)
    said = [system + text_of(rng, sizes.private) for _ in range(sizes.conversations)]
    times = []
    for turn in range(sizes.turns):
        for i in range(sizes.conversations):
            answer = await client.ask(said[i], sizes.words)
            if turn:
                times.append(answer.ttft)
            said[i] += answer.texts[0] + text_of(rng, sizes.private)
    return {"TTFT from turn 2": times}


async def samples(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    """Several answers to one prompt that nobody has seen."""
    burst = await client.samples(text_of(rng, sizes.alone), sizes.words, sizes.samples)
    return {"until all are there": [burst.seconds]}


async def no_sharing(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    """Prompts that have nothing in common."""
    one = await client.burst([text_of(rng, sizes.alone)], sizes.words)
    figures = {"TTFT": [one.last_first_token], "tokens/s, 1 at once": [one.tokens_per_second]}
    many = sizes.at_once[min(1, len(sizes.at_once) - 1)]
    burst = await client.burst([text_of(rng, sizes.alone) for _ in range(many)], sizes.words)
    return figures | {f"tokens/s, {many} at once": [burst.tokens_per_second]}


async def restart(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    """A prompt is read, the server stopped and started; the prompt comes again with another question."""
    system = text_of(rng, sizes.system)
    await client.ask(system + text_of(rng, sizes.private), sizes.words)
    await asyncio.to_thread(server.stop)
    ready = await asyncio.to_thread(server.start)
    answer = await client.ask(system + text_of(rng, sizes.private), sizes.words)
    return {"start to ready": [ready], "TTFT of a known prompt": [answer.ttft]}


@dataclass(frozen=True, slots=True)
class Workload:
    """`run` gives the figures of one round. `once`: in the last round only, as it is slow."""

    name: str
    run: Callable[[Client, Server, random.Random, Sizes], Awaitable[Figures]]
    once: bool = False


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("system prompt", system_prompt),
        Workload("documents, best first", rag_retrieval_order),
        Workload("documents, shuffled", rag_shuffled),
        Workload("conversations", conversations),
        Workload("samples", samples),
        Workload("no sharing", no_sharing),
        Workload("restart", restart, once=True),
    )
}
