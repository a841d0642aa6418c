"""Loading against computing: what each costs here, learned from what each has cost.

Invariant: estimates are finite and not negative, whatever was observed. Loading is advised only where it is expected to
be faster; but now and then it is tried all the same, or a tier that was slow once would never be asked again.

What a load takes is a line for each tier, seconds = fixed + slope * tokens, fitted by least squares with exponential
forgetting. What computing takes is the engine's `CostSurface`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from stemcache.engine.cost import CostSurface

FORGETTING: Final = 0.95
"""Weight of an observation when the next one comes: the last twenty matter."""

TRY_EVERY: Final = 32
"""Times that loading is advised against in a row before it is tried."""

# Before anything was observed. Loading looks cheap, so that it is tried: a moment, and half a GB/s; a CPU computes a
# few thousand tokens of a small model in a second.
_FIRST_LOAD: Final = 0.002
_FIRST_BYTES_PER_SECOND: Final = 5e8
_FIRST_TOKENS_PER_SECOND: Final = 2e3
# Decoding steps alone say little about what a prompt costs: their tokens pay for reading all weights.
_LEAST_PREFILL: Final = 64


@dataclass(slots=True)
class Line:
    """seconds = fixed + slope * amount, from weighted sums over observations. Begins with two that are made up."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    @classmethod
    def through(cls, amount: float, fixed: float, slope: float) -> Line:
        """A line to begin with, of little weight."""
        line = cls()
        for x in (0.0, amount):
            line.observe(x, fixed + slope * x, weight=0.5)
        return line

    def observe(self, amount: float, seconds: float, weight: float = 1.0) -> None:
        self.weight = FORGETTING * self.weight + weight
        self.x = FORGETTING * self.x + weight * amount
        self.y = FORGETTING * self.y + weight * seconds
        self.xx = FORGETTING * self.xx + weight * amount**2
        self.xy = FORGETTING * self.xy + weight * amount * seconds

    def at(self, amount: float) -> float:
        """The estimate. Neither the slope nor the fixed part is taken to be negative."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        variance = self.xx / self.weight - mean_x**2
        slope = (self.xy / self.weight - mean_x * mean_y) / variance if variance > 1e-9 * (1 + mean_x**2) else 0.0
        slope = min(max(0.0, slope), mean_y / mean_x if mean_x > 0 else 0.0)
        return max(0.0, mean_y + slope * (amount - mean_x))  # rounding may leave a hair less than nothing


class LoadCost:
    """The estimates of one engine, in tokens. Belongs to the engine's thread.

    bytes_per_token: of keys and values, for the first guess. surface: what computing takes.
    """

    def __init__(self, bytes_per_token: int, surface: CostSurface) -> None:
        self._load: dict[str, Line] = {}
        self._bytes_per_token = bytes_per_token
        self._surface = surface
        self._refused = 0

    def loaded(self, tier: str, n_tokens: int, seconds: float) -> None:
        """Note how long it took to load so many tokens' keys and values."""
        self._line(tier).observe(n_tokens, seconds)

    def load_seconds(self, tier: str, n_tokens: int) -> float:
        return self._line(tier).at(n_tokens)

    def compute_seconds(self, cached: int, new: int) -> float:
        """What computing `new` tokens after `cached` ones takes."""
        if self._surface.largest_step < _LEAST_PREFILL:
            return new / _FIRST_TOKENS_PER_SECOND
        return self._surface.seconds(cached, new)

    def advises(self, tier: str, cached: int, new: int) -> bool:
        """Whether to load `new` tokens after `cached` ones rather than compute them."""
        if self.load_seconds(tier, new) < self.compute_seconds(cached, new) or self._refused >= TRY_EVERY:
            self._refused = 0
            return True
        self._refused += 1
        return False

    def _line(self, tier: str) -> Line:
        if tier not in self._load:
            slope = self._bytes_per_token / _FIRST_BYTES_PER_SECOND
            self._load[tier] = Line.through(1024, _FIRST_LOAD, slope)
        return self._load[tier]
