"""How often something was asked for lately, in bounded memory: a count-min sketch whose counts fade.

Invariant: an estimate is never below the true faded count (but for rounding), and above it only where four unrelated
keys collide at once.

A count-min sketch with conservative update (Estan and Varghese, 2002). TinyLFU (arXiv 1512.00727) halves its counters
from time to time; here later events weigh more instead ("forward decay", Cormode and others, 2009), so that nothing
jumps, small counts do not vanish by rounding, and no moment has to touch all counters but one in 64 half-lives.
"""

from __future__ import annotations

from array import array
from struct import Struct
from typing import Final

import numpy as np

from stemcache.prefixtree.errors import InvariantError

_ROWS: Final = Struct("<4Q")
_LARGEST_SCALE: Final = 2.0**64  # single precision ends at 2**128: leaves room for counts


class FrequencySketch:
    """Counts of 32-byte digests, halved for every `half_life` that is counted.

    Args:
        n_keys: how many keys have a count that has not faded away. It takes 64 to 128 bytes for each. With several
            times as many, keys that were never added begin to have an estimate above 0.
        half_life: the total of the counts added until an earlier one is worth half.

    Attributes:
        age: how many half-lives have passed, so that who keeps counts elsewhere can fade them alike.

    Raises:
        ValueError: `n_keys` or `half_life` is not positive.
    """

    def __init__(self, n_keys: int, half_life: float) -> None:
        if n_keys < 1 or not half_life > 0:
            raise ValueError(f"n_keys and half_life must be positive, not {n_keys} and {half_life}")
        width = 1 << (4 * n_keys - 1).bit_length()
        self._mask = width - 1
        self._rows = tuple(array("f", bytes(4 * width)) for _ in range(4))
        self._half_life = half_life
        self._growth = 2.0 ** (1.0 / half_life)
        self._scale = 1.0  # what a count of one is written as now
        self.age = 0.0  # in half-lives: what was counted at an age of 2 is worth a quarter at 4

    def estimate(self, digest: bytes) -> float:
        """Return the faded count of a key; 0 for one that was never added, unless it collides. O(1)."""
        a, b, c, d = _ROWS.unpack(digest)
        rows, mask = self._rows, self._mask
        least: float = min(rows[0][a & mask], rows[1][b & mask], rows[2][c & mask], rows[3][d & mask])
        return least / self._scale

    def add(self, digest: bytes, count: float = 1.0) -> None:
        """Count a key `count` times more. O(1), amortised."""
        new = (self.estimate(digest) + count) * self._scale
        for row, key in zip(self._rows, _ROWS.unpack(digest), strict=True):
            place = key & self._mask
            if row[place] < new:
                row[place] = new
        self._scale *= self._growth**count
        self.age += count / self._half_life
        if self._scale > _LARGEST_SCALE:
            self._rescale()

    def check(self) -> None:
        """Raise InvariantError if a counter is negative, infinite or no number. O(counters)."""
        for row in self._rows:
            if not all(0.0 <= count < float("inf") for count in row):
                raise InvariantError("frequency: a counter is not a finite count")

    def _rescale(self) -> None:
        for row in self._rows:  # a view: in plain Python the sketch of a large pool would take seconds
            np.frombuffer(row, dtype=np.float32)[:] /= self._scale
        self._scale = 1.0
