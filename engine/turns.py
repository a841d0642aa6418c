"""Turns within one tenant's queue: those first whose prompts are cached for the most part.

Invariant: nobody is overtaken more often than the bound says. Whoever was, goes before all that came later.

RAGCache's reordering (arXiv 2404.12457, section 5.2): cached tokens over tokens to compute. It must not go beyond one
tenant, for the order of answers would tell one what another has cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

Waiting = TypeVar("Waiting")

# RAGCache's evaluation has 32. So many are looked at, and each may be overtaken so often.
WINDOW: Final = 32


def cache_first(
    queue: Sequence[Waiting],
    cached_share: Callable[[Waiting], float],
    overtaken: Callable[[Waiting], int],
    window: int = WINDOW,
) -> list[Waiting]:
    """Return `queue`, given by arrival, in the order of turns: a permutation of its first `window`, then the rest.

    Args:
        cached_share: cached tokens of a prompt over those to compute, now. Called for the first `window` only, and
            not where one waits alone.
        overtaken: how many that came later have started before it.
    """
    if len(queue) < 2:
        return list(queue)
    head, rest = queue[:window], queue[window:]
    due = [each for each in head if overtaken(each) >= window]
    free = [each for each in head if overtaken(each) < window]
    return [*due, *sorted(free, key=cached_share, reverse=True), *rest]
