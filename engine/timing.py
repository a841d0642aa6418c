"""When a request was submitted, started, gave its first token and ended.

Invariant: written by the engine's thread only, in this order, each once; anybody may read. Seconds of
`time.perf_counter`, None for what has not happened.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Timing:
    """The times of one request. A request that is preempted or restarted has started once."""

    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None

    def start(self) -> None:
        self.started = self.started or time.perf_counter()

    def token(self) -> None:
        self.first_token = self.first_token or time.perf_counter()

    def end(self) -> None:
        self.ended = self.ended or time.perf_counter()
