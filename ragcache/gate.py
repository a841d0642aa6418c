"""The gate: whether reading provisional documents is worth it, by what searches and steps have taken so far.

Invariant: nothing is guessed at before a search has been seen, nor where the rest of a search is expected to take less
time than the model takes for a step. So catalogues that are searched in a few milliseconds never pay for speculation.

What a right guess saves is the time that is left of the search when it is made, less one more pass over the weights,
as its prompt is computed in one piece more. A wrong one costs the composing of its prompt: its steps are cut so that
one takes no longer than what is left of the search, and then nobody waits for it. Rejected: guessing at whatever
changes while the engine has room, as RAGCache does; on a CPU a step of a whole prompt takes a hundred times as long as
most searches, and each wrong guess would be waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from stemcache.engine.cost import CostSurface

# A mean over about so many of the last searches.
_MEMORY: Final = 16


@dataclass(slots=True)
class _Stage:
    """Of one stage's list: the share of searches of which it was the result, and the seconds until that was known."""

    right: float
    seconds_left: float


class Gate:
    """Learns and decides; from any thread. chunk_tokens: the least that is worth computing."""

    def __init__(self, cost: CostSurface, *, chunk_tokens: int, max_tokens: int) -> None:
        self._cost = cost
        self._chunk_tokens = chunk_tokens
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._search: float | None = None
        self._compose = 0.0
        self._stages: list[_Stage] = []

    def searched(self, seconds: Sequence[float], right: Sequence[bool]) -> None:
        """A search took these seconds, stage by stage; after which of them was its list the final one?

        A search in one stage says only how long a search takes.
        """
        with self._lock:
            self._search = sum(seconds) if self._search is None else _nearer(self._search, sum(seconds))
            for number, was_right in enumerate(right if len(right) > 1 else ()):
                left = sum(seconds[number + 1 :])
                if number == len(self._stages):
                    self._stages.append(_Stage(float(was_right), left))
                stage = self._stages[number]
                stage.right = _nearer(stage.right, float(was_right))
                stage.seconds_left = _nearer(stage.seconds_left, left)

    def composed(self, seconds: float) -> None:
        """A provisional prompt took so long to be made."""
        with self._lock:
            self._compose = _nearer(self._compose or seconds, seconds)

    def wants_stages(self) -> bool:
        """Whether to search in stages at all; some indexes are slower so."""
        return self._search is not None and self._search > self._cost.coefficients[0] > 0.0

    def step_tokens(self, stage: int) -> int:
        """How many tokens a step may compute on a guess that is made after a stage; 0: make none."""
        with self._lock:
            if stage >= len(self._stages):
                return 0
            known, compose = self._stages[stage], self._compose
            right, left = known.right, known.seconds_left
        saved = right * (left - self._cost.coefficients[0]) - (1.0 - right) * compose
        if saved <= 0.0 or not 0.0 < self._cost.seconds(0, self._chunk_tokens) <= left:
            return 0
        tokens = self._chunk_tokens
        while tokens < self._max_tokens and self._cost.seconds(0, 2 * tokens) <= left:
            tokens *= 2
        return tokens


def _nearer(mean: float, value: float) -> float:
    return mean + (value - mean) / _MEMORY
