"""Tentative requests: work that may turn out to be wanted, done only while there is nothing else to do.

Invariant: a tentative request's fate is decided once, by whoever comes first: its owner keeps it, and it is a request
like any other from then on, or it is dropped, and nobody ever reads its stream. Until then it runs only on an engine
without other requests, in short steps, and gives way to whatever comes.
"""

from __future__ import annotations

import threading
from typing import Literal


class Tentative:
    """What `Engine.submit` takes for a tentative request. From any thread; waits for nobody's step.

    step_tokens: tokens of the prompt that one step computes at most, as others have to wait for the step.
    """

    def __init__(self, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self._lock = threading.Lock()
        self._fate: Literal["open", "kept", "dropped"] = "open"

    @property
    def is_open(self) -> bool:
        """Whether it is undecided."""
        return self._fate == "open"

    def keep(self) -> bool:
        """Make it a request like any other; False if it was dropped."""
        return self._decide("kept")

    def drop(self) -> bool:
        """Make it one that nobody wants; False if it was kept."""
        return self._decide("dropped")

    def _decide(self, fate: Literal["kept", "dropped"]) -> bool:
        with self._lock:
            if self._fate == "open":
                self._fate = fate
            return self._fate == fate
