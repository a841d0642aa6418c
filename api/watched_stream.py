"""A watched stream: an engine's stream on its way to HTTP, with a time limit, and with its times told to the metrics.

Invariant: it ends once: by itself, with an error, out of time or cancelled; `on_end` is then called once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import ClassVar

from stemcache.api.context import Outcome, RequestContext
from stemcache.api.errors import ApiError
from stemcache.api.metrics import Metrics
from stemcache.engine.outputs import Delta, TokenLogprob, Usage
from stemcache.engine.stream import Stream


class RequestTimeoutError(ApiError):
    """The request was not finished in time."""

    status = 504
    type: ClassVar[str] = "server_error"
    code = "request_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"The answer was not finished within {seconds:g} seconds, this server's limit; ask for fewer tokens.",
            {"x-should-retry": "false"},  # OpenAI's clients would ask the same again, twice
        )


class WatchedStream:
    """Read it as a Stream, in an `async for`. Made in the event loop that reads it.

    Attributes:
        on_first_token: called with the seconds from the request's arrival, if anything is generated.
        on_start: called when its prompt has been read: `usage` then says what of it was found.
    """

    def __init__(
        self,
        stream: Stream,
        context: RequestContext,
        metrics: Metrics,
        seconds: float | None,
        on_end: Callable[[WatchedStream], None],
    ) -> None:
        self._stream = stream
        self._context = context
        self._metrics = metrics
        self._seconds = seconds
        self._on_end = on_end
        self.on_first_token: Callable[[float], None] | None = None
        self.on_start: Callable[[Usage], None] | None = None
        self._has_ended = self._is_late = False
        self._timer: asyncio.TimerHandle | None = None
        if seconds is not None:
            left = context.started + seconds - time.perf_counter()
            self._timer = asyncio.get_running_loop().call_later(left, self._expire)

    @property
    def usage(self) -> Usage:
        return self._stream.usage

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None]:
        return self._stream.prompt_logprobs

    @property
    def waits(self) -> bool:
        """Whether it has not been started yet."""
        return self._stream.timing.started is None

    def cancel(self) -> None:
        """Stop it, unless it has ended."""
        self._stream.cancel()
        self._end("cancelled")

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Raises RequestTimeoutError, and what the stream raises."""
        latest: dict[int, float] = {}
        try:
            async for delta in self._stream:
                self._observe(delta, latest)
                yield delta
            if self._is_late:
                assert self._seconds is not None
                raise RequestTimeoutError(self._seconds)
        except Exception:
            self._end("timeout" if self._is_late else "failed")
            raise
        self._end(None)

    def _observe(self, delta: Delta, latest: dict[int, float]) -> None:
        now = time.perf_counter()
        if not latest:
            self._begin(delta, now - self._context.started)
        elif delta.index in latest:
            self._metrics.next_token(now - latest[delta.index])
        latest[delta.index] = now
        if delta.finish_reason is not None:
            self._metrics.choice(delta.finish_reason)

    def _begin(self, delta: Delta, seconds: float) -> None:
        """The first delta has come. One without a token ends a request that only wanted its prompt read."""
        self._metrics.first_token(seconds, self.usage)
        if self.on_first_token is not None and delta.token_ids:
            self.on_first_token(seconds)
        if self.on_start is not None:
            self.on_start(self.usage)

    def _expire(self) -> None:
        """Out of time. The engine ends the stream after its running step, and then the reader is told why."""
        self._is_late = True
        self._stream.cancel()

    def _end(self, outcome: Outcome | None) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        if self._timer is not None:
            self._timer.cancel()
        if outcome is None:
            self._metrics.ended(self._stream.timing, self._context.started)
        self._context.ended = self._context.ended or outcome
        self._on_end(self)
