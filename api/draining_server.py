"""uvicorn's server with an end in two parts: first everything that runs is finished while the port still answers, with
503, so that load balancers learn of it; then the port is closed.

Invariant: the first SIGINT or SIGTERM begins the draining, a second one ends the server at once.
"""

from __future__ import annotations

import time
from types import FrameType

import uvicorn

from stemcache.api.drain import Drain


class DrainingServer(uvicorn.Server):
    """Drains for `grace_seconds` at most."""

    def __init__(self, config: uvicorn.Config, drain: Drain, *, grace_seconds: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._grace_seconds = grace_seconds
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain.has_begun:
            self.should_exit = self.force_exit = True
        else:
            self._deadline = time.monotonic() + self._grace_seconds
            self._drain.begin()
        self._captured_signals.append(sig)

    async def on_tick(self, counter: int) -> bool:
        if self._drain.is_done or (self._drain.has_begun and time.monotonic() > self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)
