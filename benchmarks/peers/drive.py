"""Requests to a server over HTTP, streamed, with the times of their first and last words.

Invariant: an answer has exactly the words that were asked for, or it is an error: servers are compared on equal work.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx


class AnswerError(Exception):
    """A server refused a request, or answered something else than was asked for."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's answer.

    Times in seconds: from sending to the first word, and to the end. `texts`: one a choice. `cached_tokens`: of the
    prompt, as the server says; None if it does not.
    """

    begin: float
    first: float
    end: float
    texts: tuple[str, ...]
    cached_tokens: int | None

    @property
    def ttft(self) -> float:
        return self.first - self.begin


@dataclass(frozen=True, slots=True)
class Burst:
    """Answers of requests that were sent together."""

    answers: tuple[Answer, ...]

    @property
    def tokens_per_second(self) -> float:
        """Words of all answers over the time from the first request to the last word."""
        words = sum(len(text.split()) for answer in self.answers for text in answer.texts)
        return words / self.seconds

    @property
    def seconds(self) -> float:
        return max(answer.end for answer in self.answers) - min(answer.begin for answer in self.answers)

    @property
    def last_first_token(self) -> float:
        """Seconds from the first request until each has its first word."""
        return max(answer.first for answer in self.answers) - min(answer.begin for answer in self.answers)


class Client:
    """Asks one server. `honours_n`: whether the server knows the field; otherwise n requests are sent."""

    def __init__(self, url: str, model: str, *, honours_n: bool) -> None:
        self._model = model
        self._honours_n = honours_n
        # A connection for each request: one that is kept may be ended by its server just as the next request is sent,
        # as llama.cpp did once.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=600, limits=limits)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def ask(self, prompt: str, words: int, *, n: int = 1, temperature: float = 0) -> Answer:
        """Complete a prompt with so many words, n times. Raises AnswerError."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": words,
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if n > 1:
            body["n"] = n
        texts, cached, first = [""] * n, None, None
        begin = time.perf_counter()
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if not response.is_success:
                raise AnswerError(f"status {response.status_code}: {(await response.aread()).decode()[:500]}")
            async for event in _events(response):
                for choice in event.get("choices", ()):
                    if choice.get("text"):
                        first = first or time.perf_counter()
                        texts[choice["index"]] += choice["text"]
                cached = ((event.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens", cached)
        if [len(text.split()) for text in texts] != [words] * n or first is None:
            raise AnswerError(f"{n} times {words} words were asked for, the answer is {texts}")
        return Answer(begin, first, time.perf_counter(), tuple(texts), cached)

    async def burst(self, prompts: Sequence[str], words: int) -> Burst:
        """Complete all prompts at once."""
        return Burst(tuple(await asyncio.gather(*(self.ask(prompt, words) for prompt in prompts))))

    async def samples(self, prompt: str, words: int, n: int) -> Burst:
        """n answers to one prompt, at temperature 1."""
        if self._honours_n:
            return Burst((await self.ask(prompt, words, n=n, temperature=1),))
        return Burst(tuple(await asyncio.gather(*(self.ask(prompt, words, temperature=1) for _ in range(n)))))


async def _events(response: httpx.Response) -> Any:
    """The JSON objects of a stream of server-sent events."""
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise AnswerError(str(event["error"]))
            yield event
