"""A stream: one request's deltas on their way from the engine's thread to whoever reads them.

Invariant: the engine's thread only appends; one reader takes, in a `for` or an `async for`. Leaving a `with stream:`
block early cancels the request, so nobody pays for tokens that nobody reads.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType

from stemcache.engine.outputs import Delta, TokenLogprob, Usage
from stemcache.engine.timing import Timing


class Stream:
    """The deltas of one request, in order. Made by `Engine.submit`.

    Attributes:
        prompt_logprobs: of the prompt's tokens, where they were asked for, else empty. Complete when the first delta
            comes. The first token's is None, for nothing stands before it.
    """

    def __init__(self, prompt_tokens: int, cancel: Callable[[], None]) -> None:
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self._cancel = cancel
        self._deltas: deque[Delta] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], None] | None = None
        self._ended = False
        self._error: BaseException | None = None
        self._usage = Usage(prompt_tokens, 0, 0)
        self.timing = Timing()

    @property
    def usage(self) -> Usage:
        """Tokens so far; complete when the iteration has ended."""
        return self._usage

    def cancel(self) -> None:
        """Stop the request; from any thread, any number of times. Its computed chunks stay cached."""
        if not self._ended:
            self._cancel()

    # -- the engine's side ------------------------------------------------------------------------------------------

    def push(self, delta: Delta | None, usage: Usage) -> None:
        """Deliver a delta (None: only the usage changed)."""
        with self._changed:
            self._usage = usage
            if delta is not None:
                self.timing.token()
                self._deltas.append(delta)
            self._notify()

    def end(self, error: BaseException | None = None) -> None:
        """No further delta will come; `error` is raised to the reader after those that did."""
        with self._changed:
            self.timing.end()
            self._ended, self._error = True, error
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._wake is not None:
            try:
                self._wake()
            except RuntimeError:  # the reader's event loop is closed: nobody will read on
                self._wake = None
                self._cancel()

    # -- the reader's side ------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Delta]:
        while True:
            with self._changed:
                while not self._deltas and not self._ended:
                    self._changed.wait()
                if not self._deltas:
                    break
                delta = self._deltas.popleft()
            yield delta
        self._raise_error()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        loop, awake = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._wake = lambda: (loop.call_soon_threadsafe(awake.set), None)[1]
        while True:
            awake.clear()
            with self._changed:
                ready, ended = list(self._deltas), self._ended
                self._deltas.clear()
            for delta in ready:
                yield delta
            if ended and not ready:
                break
            if not ended:
                await awake.wait()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
