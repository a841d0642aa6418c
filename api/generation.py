"""A generation: the streams of one HTTP request, one a prompt, as one.

Invariant: when the `async with` block is left, no stream of it runs any more, whatever the reason for leaving.
Choice j of prompt i has index i * n + j, as OpenAI numbers them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from stemcache.engine.outputs import Delta, FinishReason, TokenLogprob, Usage

if TYPE_CHECKING:
    from stemcache.api.admission import Admitted
    from stemcache.api.watched_stream import WatchedStream
    from stemcache.engine.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class IndexedDelta:
    """A delta, and the index of the HTTP request's choice that it belongs to."""

    choice: int
    delta: Delta


@dataclass(slots=True)
class Choice:
    """All that was generated for one choice."""

    index: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason


class Generation:
    """Several streams, read as one. Made by `submit`."""

    def __init__(self, streams: Sequence[WatchedStream], n: int) -> None:
        self._streams = streams
        self._n = n
        self._pumps: list[asyncio.Task[None]] = []

    @classmethod
    def submit(cls, admitted: Admitted, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Generation:
        """Submit all prompts, or none. Raises InvalidRequestError, EngineClosedError."""
        streams: list[WatchedStream] = []
        try:
            for prompt in prompts:
                streams.append(admitted.submit(list(prompt), params))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return cls(streams, params.n)

    @property
    def usage(self) -> Usage:
        """The sums over the prompts; complete when all deltas were read."""
        usages = [stream.usage for stream in self._streams]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
        )

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams:
            stream.cancel()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def deltas(self) -> AsyncIterator[IndexedDelta]:
        """The deltas of all choices as they come. Raises EngineError when the engine dies."""
        arrived: asyncio.Queue[IndexedDelta | Exception | None] = asyncio.Queue()
        self._pumps = [
            asyncio.create_task(self._pump(stream, index * self._n, arrived))
            for index, stream in enumerate(self._streams)
        ]
        running = len(self._pumps)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item

    async def collect(self) -> list[Choice]:
        """All choices, complete, by index."""
        choices = [Choice(index) for index in range(len(self._streams) * self._n)]
        async for item in self.deltas():
            choices[item.choice].add(item.delta)
        return choices

    async def _pump(
        self, stream: WatchedStream, first_choice: int, arrived: asyncio.Queue[IndexedDelta | Exception | None]
    ) -> None:
        """Forward one stream's deltas, then None; or the error that ended it."""
        try:
            async for delta in stream:
                arrived.put_nowait(IndexedDelta(first_choice + delta.index, delta))
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)
