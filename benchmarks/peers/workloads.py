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
from peers.commands import ON_DISK, OURS
from peers.drive import Client
from peers.server import Server

Figures = dict[str, list[float]]
"""Samples by what was measured; the names say the unit: seconds where there is none, or tokens/s, or MB."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens, requests and words of all workloads. A smoke run has smaller ones.

    words: of an answer of which the first word is timed. answer: of one whose tokens per second are.
    """

    system: int = 2048
    private: int = 32
    words: int = 4
    answer: int = 32
    asks: int = 4
    few: int = 8
    many: int = 32
    documents: int = 24
    document: int = 256
    retrieved: int = 4
    questions: int = 8
    conversations: int = 3
    turns: int = 4
    alone: int = 512
    samples: int = 8


QUICK = Sizes(
    system=200, answer=4, asks=2, few=3, many=5, documents=6, document=40, retrieved=2, questions=3,
    conversations=2, turns=2, alone=60, samples=3,
)  # fmt: skip


async def system_prompt(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    """One long system prompt, short questions one after the other."""
    system = text_of(rng, sizes.system)
    cold = await client.ask(system + text_of(rng, sizes.private), sizes.words)
    warm = [await client.ask(system + text_of(rng, sizes.private), sizes.words) for _ in range(sizes.asks)]
    long = await client.burst([system + text_of(rng, sizes.private)], sizes.answer)
    return {
        "TTFT cold": [cold.ttft],
        "TTFT warm": [answer.ttft for answer in warm],
        "tokens/s": [long.tokens_per_second],
    }


async def sharers(client: Client, server: Server, rng: random.Random, sizes: Sizes, *, n: int) -> Figures:
    """Many requests at once over a system prompt that has been read."""
    system = text_of(rng, sizes.system)
    await client.ask(system + text_of(rng, sizes.private), sizes.words)
    before = server.memory_bytes()
    burst = await client.burst([system + text_of(rng, sizes.private) for _ in range(n)], sizes.answer)
    return {
        "last TTFT": [burst.last_first_token],
        "tokens/s": [burst.tokens_per_second],
        "MB a sharer": [(server.memory_bytes() - before) / n / 1e6],
    }


async def few_sharers(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    """A handful of them."""
    return await sharers(client, server, rng, sizes, n=sizes.few)


async def many_sharers(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    """As many as all servers have room for."""
    return await sharers(client, server, rng, sizes, n=sizes.many)


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
    burst = await client.samples(text_of(rng, sizes.alone), sizes.answer, sizes.samples)
    return {"until all are there": [burst.seconds]}


async def no_sharing(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    """Prompts that have nothing in common."""
    one = await client.burst([text_of(rng, sizes.alone)], sizes.answer)
    burst = await client.burst([text_of(rng, sizes.alone) for _ in range(sizes.few)], sizes.answer)
    return {
        "TTFT": [one.last_first_token],
        "tokens/s, 1 at once": [one.tokens_per_second],
        f"last TTFT of {sizes.few}": [burst.last_first_token],
        f"tokens/s, {sizes.few} at once": [burst.tokens_per_second],
    }


async def restart(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    """A prompt is read, the server stopped and started; the prompt comes again with another question. A first start
    has what it reads in the system's cache of files, as it is on a machine that serves one thing."""
    system = text_of(rng, sizes.system)
    await asyncio.to_thread(server.start)
    await client.ask(system + text_of(rng, sizes.private), sizes.words)
    await asyncio.to_thread(server.stop)
    ready = await asyncio.to_thread(server.start)
    answer = await client.ask(system + text_of(rng, sizes.private), sizes.words)
    return {
        "start to ready": [ready],
        "TTFT of a known prompt": [answer.ttft],
        "start to first word": [ready + answer.ttft],
    }


@dataclass(frozen=True, slots=True)
class Workload:
    """`run` gives the figures of one round. alone: no other server is in memory, and it starts its own; so only once,
    after everything else. ours: which of our servers the others are compared with. without: who is not asked."""

    name: str
    run: Callable[[Client, Server, random.Random, Sizes], Awaitable[Figures]]
    alone: bool = False
    ours: str = OURS.name
    without: frozenset[str] = frozenset()


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("system prompt", system_prompt),
        Workload("few sharers", few_sharers),
        Workload("many sharers", many_sharers),
        Workload("documents, best first", rag_retrieval_order),
        Workload("documents, shuffled", rag_shuffled),
        Workload("conversations", conversations),
        Workload("samples", samples),
        Workload("no sharing", no_sharing),
        Workload("restart", restart, alone=True, ours=ON_DISK.name, without=frozenset({OURS.name})),
    )
}
