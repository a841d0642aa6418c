"""One question to a server, as a client sees it: the answer, its token counts and the time to its first token."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

from stemcache.engine.demo.facts import SYSTEM_PROMPT, Fact, FactDocument, is_right


@dataclass(frozen=True, slots=True)
class Question:
    """A fact to ask for, and the documents to answer from."""

    fact: Fact
    documents: tuple[FactDocument, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `ttft_seconds` runs from sending the request to the first text."""

    question: Question
    text: str
    prompt_tokens: int
    cached_tokens: int
    ttft_seconds: float

    @property
    def is_right(self) -> bool:
        return is_right(self.question.fact, self.text)

    @property
    def is_warm(self) -> bool:
        """Whether the documents were read before: the system prompt alone is far less than half of the prompt."""
        return 2 * self.cached_tokens > self.prompt_tokens


async def ask(client: httpx.AsyncClient, question: Question) -> Answer:
    """Stream one chat completion. Raises httpx.HTTPError."""
    body = {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": question.fact.question},
        ],
        "documents": [document.as_template_document() for document in question.documents],
        "temperature": 0,
        "max_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    texts: list[str] = []
    first = usage = None
    start = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            chunk = _parse(line)
            usage = chunk.get("usage") or usage
            text = "".join(choice["delta"].get("content", "") for choice in chunk.get("choices", ()))
            if text and first is None:
                first = time.perf_counter() - start
            texts.append(text)
    if usage is None or first is None:
        raise httpx.RemoteProtocolError("the stream ended without an answer")
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Answer(question, "".join(texts), usage["prompt_tokens"], cached, first)


def _parse(line: str) -> dict[str, Any]:
    """A line of an event stream; blank lines and the end mark say nothing."""
    data = line.removeprefix("data: ")
    chunk: dict[str, Any] = json.loads(data) if data and data != "[DONE]" else {}
    return chunk
