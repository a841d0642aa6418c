"""A generation: the streams of one HTTP request, one a prompt, as one.

Invariant: when the `async with` block is left, no stream of it runs any more, whatever the reason for leaving.
Choice j of prompt i has index i * n + j, as OpenAI numbers them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from stemcache.engine.outputs import Delta, FinishReason, TokenLogprob, Usage
from stemcache.engine.sampling import SamplingParams
from stemcache.prefixtree.expected import NOTHING

if TYPE_CHECKING:
    from stemcache.api.admission import Admitted
    from stemcache.api.watched_stream import WatchedStream
    from stemcache.engine.blend import Blend
    from stemcache.engine.stream import Stream
    from stemcache.prefixtree.expected import Expected


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens, and its text as the caller wrote it, where it was text and nothing was cut off.

    submitted: to be called when the engine has it. started: when it has been read, with what of it was found.
    blend: which parts of it may be moved there. stream: of its answer, where the engine has it already.
    expected: how often its beginnings were asked for.
    """

    token_ids: list[int]
    text: str | None = None
    submitted: Callable[[], None] | None = None
    started: Callable[[Usage], None] | None = None
    blend: Blend | None = None
    stream: Stream | None = None
    expected: Expected = NOTHING


@dataclass(frozen=True, slots=True)
class IndexedDelta:
    """A delta, and the index of the HTTP request's choice that it belongs to."""

    choice: int
    delta: Delta


@dataclass(slots=True)
class Choice:
    """All that was generated for one choice; `prompt` is the index of the prompt that it continues."""

    index: int
    prompt: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason


class Generation:
    """Several streams, read as one. Made by `submit`.

    Attributes:
        prompts: what was submitted.
        choices: all of them, by index, once all deltas were read.
        when_complete: called with them then.
    """

    def __init__(self, admitted: Admitted, prompts: Sequence[Prompt], streams: Sequence[WatchedStream], n: int) -> None:
        self.prompts = prompts
        self.when_complete: Callable[[list[Choice]], None] | None = None
        self._admitted = admitted
        self._streams = streams
        self.choices: list[Choice] = []
        self._n = n
        self._pumps: list[asyncio.Task[None]] = []

    @classmethod
    def submit(cls, admitted: Admitted, prompts: Sequence[Prompt], params: SamplingParams) -> Generation:
        """Submit all prompts, or none. Raises InvalidRequestError, EngineClosedError."""
        streams: list[WatchedStream] = []
        try:
            for prompt in prompts:
                stream = admitted.submit(
                    prompt.token_ids, params, blend=prompt.blend, expected=prompt.expected, submitted=prompt.stream
                )
                streams.append(stream)
                stream.on_start = prompt.started
                if prompt.submitted is not None:
                    prompt.submitted()
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return cls(admitted, prompts, streams, params.n)

    @property
    def usage(self) -> Usage:
        """The sums over the prompts; complete when all deltas were read."""
        usages = [stream.usage for stream in self._streams]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
            cache_write_tokens=sum(usage.cache_write_tokens for usage in usages),
            moved=tuple(moved for usage in usages for moved in usage.moved),
        )

    def prompt_index(self, choice: int) -> int:
        """Which prompt a choice belongs to."""
        return choice // self._n

    def prompt_logprobs(self, prompt: int) -> list[TokenLogprob | None]:
        """Of a prompt's own tokens, where they were asked for; complete when the prompt's first delta has come."""
        return self._streams[prompt].prompt_logprobs

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
        choices = [Choice(index, self.prompt_index(index)) for index in range(len(self._streams) * self._n)]
        running = len(self._pumps)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                choices[item.choice].add(item.delta)
                yield item
        self.choices = choices
        if self.when_complete is not None:
            self.when_complete(choices)

    async def collect(self) -> list[Choice]:
        """All choices, complete, by index."""
        async for _ in self.deltas():
            pass
        return self.choices

    def read(self, token_ids: list[int]) -> None:
        """Have the engine read tokens into the cache, on behalf of the same client; nobody waits for it."""
        self._admitted.read(token_ids)

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
