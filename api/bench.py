"""`stemcache bench`: the time to the first token of a running server, where context repeats.

Invariant: everything is measured at the client, on answers that the server gave; and every run asks for texts that no
server has seen, so that what is cached is what the run itself has caused.

The requests are as those of retrieval: a system prompt, a few documents of a catalogue, the k-th as popular as 1/k
(Zipf), and a question. They are ordinary chats, so other OpenAI-compatible servers can be measured as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stemcache.api.cache_client import ask_server, key_headers
from stemcache.api.charts import draw_dots, require_charts
from stemcache.prefixtree.errors import StemcacheError
from stemcache.ragcache.server_answer import base_of

_SYLLABLES: Final = ("ba", "den", "fi", "gor", "hul", "ka", "lem", "mo", "nar", "pel", "ri", "sut", "ta", "vor", "wen")


class BenchError(StemcacheError):
    """The server cannot be measured; the message says why."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. cached_tokens: as the server tells; None where it tells nothing. Times in seconds."""

    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    ttft: float
    total: float

    @property
    def is_cached(self) -> bool:
        """Whether more than half of the prompt was."""
        return 2 * (self.cached_tokens or 0) > self.prompt_tokens


def bench(options: argparse.Namespace) -> int:
    """Run it, print a table, write what was asked for. Raises StemcacheError, OSError."""
    if options.chart:
        require_charts(options.chart)
    rng = random.Random(options.seed) if options.seed is not None else random.Random()
    model = ask_server(options.url, "GET", "models")["data"][0]["id"]
    bodies = [body | {"model": model} for body in _requests(rng, options)]
    began = time.perf_counter()
    samples = asyncio.run(_ask_all(options, bodies))
    seconds = time.perf_counter() - began
    Console(highlight=False).print(_table(samples, seconds))
    if options.json:
        figures = {"seconds": seconds, "requests": [asdict(sample) for sample in samples]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if options.chart:
        _draw(samples, options.chart)
    return 0


def _draw(samples: Sequence[Sample], path: Path) -> None:
    """Each request as a dot, by how much of its prompt was computed."""
    title = "Time to the first token, by what was not cached"
    points = [(s.prompt_tokens - (s.cached_tokens or 0), 1000 * s.ttft) for s in samples]
    draw_dots(title, "tokens of the prompt computed", "milliseconds", points, path)


def _requests(rng: random.Random, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The bodies, in order."""
    catalogue = [_text(rng, options.document_words) for _ in range(options.documents)]
    popularity = [1 / rank for rank in range(1, options.documents + 1)]
    system = f"Answer from the documents. Run {rng.getrandbits(64):x}."
    for _ in range(options.requests):
        chosen: dict[int, None] = {}
        while len(chosen) < min(options.k, options.documents):
            chosen |= dict.fromkeys(rng.choices(range(options.documents), popularity))
        text = "\n\n".join([*(catalogue[each] for each in chosen), _text(rng, 12) + "?"])
        yield {
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": text}],
            "max_tokens": options.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def _text(rng: random.Random, n_words: int) -> str:
    return " ".join("".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3))) for _ in range(n_words))


async def _ask_all(options: argparse.Namespace, bodies: Sequence[dict[str, Any]]) -> list[Sample]:
    free = asyncio.Semaphore(options.concurrency)

    async def ask(body: dict[str, Any]) -> Sample:
        async with free:
            return await _ask(client, body)

    try:
        async with httpx.AsyncClient(
            base_url=base_of(options.url), headers=key_headers(), trust_env=False, timeout=600
        ) as client:
            pending = [asyncio.ensure_future(ask(body)) for body in bodies]
            bar = Progress(console=Console(stderr=True), transient=True)
            with bar:
                task = bar.add_task("asking", total=len(pending))
                for each in pending:
                    each.add_done_callback(lambda _: bar.advance(task))
                return await asyncio.gather(*pending)
    except httpx.HTTPStatusError as error:
        raise BenchError(f"{options.url} answered {error.response.status_code} to a request") from None
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise BenchError(f"{options.url} cannot be measured: {str(error) or type(error).__name__}") from None


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Sample:
    """One request; its first token is the first chunk with a choice whose text is not empty."""
    first, usage, began = None, None, time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage") or usage
            if first is None and any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                first = time.perf_counter() - began
    total = time.perf_counter() - began
    if usage is None:
        raise ValueError("its streams end without usage")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Sample(usage["prompt_tokens"], cached, usage["completion_tokens"], first or total, total)


def _table(samples: Sequence[Sample], seconds: float) -> Table:
    prompt, cached = (
        sum(sample.prompt_tokens for sample in samples),
        sum(sample.cached_tokens or 0 for sample in samples),
    )
    generated = sum(sample.completion_tokens for sample in samples)
    table = Table(
        box=None,
        pad_edge=False,
        title=f"{cached / prompt:.0%} of {prompt:,} prompt tokens were cached; {generated / seconds:.0f} tokens a "
        "second came out",
        title_justify="left",
    )
    table.add_column("time to the first token, ms")
    for name in ("requests", "p50", "p90", "p99"):
        table.add_column(name, justify="right")
    kinds: dict[str, Callable[[Sample], bool]] = {
        "mostly cached": lambda sample: sample.is_cached,
        "mostly computed": lambda sample: not sample.is_cached,
        "all": lambda sample: True,
    }
    for name, is_one in kinds.items():
        times = sorted(sample.ttft for sample in samples if is_one(sample))
        quantiles = [f"{1000 * _quantile(times, q):.0f}" if times else "-" for q in (0.5, 0.9, 0.99)]
        table.add_row(name, str(len(times)), *quantiles)
    return table


def _quantile(ordered: Sequence[float], q: float) -> float:
    """By linear interpolation between the nearest ranks."""
    if len(ordered) == 1:
        return ordered[0]
    return statistics.quantiles(ordered, n=1000, method="inclusive")[round(1000 * q) - 1]
