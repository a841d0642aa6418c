"""Where two texts, or two prompts, begin to differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many leading elements two strings, or two lists of token ids, share.

    By bisection: comparing slices is faster than elements.
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
