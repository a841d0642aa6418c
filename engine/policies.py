"""The eviction policies by the names that users give them, over the engine's own cost surface."""

from __future__ import annotations

import math
from typing import Final

from stemcache.engine.cost import CostSurface
from stemcache.prefixtree.eviction import LFU, LRU, EvictionPolicy
from stemcache.prefixtree.fading_pgdsf import FadingPGDSF
from stemcache.prefixtree.frequency import FrequencySketch

EVICTIONS: Final = ("lru", "lfu", "pgdsf")
QUEUES: Final = ("fcfs", "cache")

# A use is worth half after so many times as many chunks have come and gone as there is room for. Where nothing drifts
# more is better, and for conversations, which end, less (docs/policies.md). After twenty turnovers little is left of a
# use, and so many chunks must be told apart, or passers-by are taken for old acquaintances: in simulation (k=5, order
# of relevance, a half-life of four turnovers) 6.3 % of the documents were hit with room for as many chunks as the pool
# has, 7.5 % with four times as many, 7.9 with ten, 8.1 with twenty and with forty.
HISTORY_TURNOVERS: Final = 2.5
HALF_LIVES: Final = 8


def history_for(n_chunks: int) -> FrequencySketch:
    """Return what PGDSF remembers of evicted chunks, for a pool of `n_chunks`: 1.3 to 2.5 KB for each."""
    half_life = HISTORY_TURNOVERS * n_chunks
    return FrequencySketch(math.ceil(HALF_LIVES * half_life), half_life)


def eviction_policy(name: str, n_chunks: int, chunk_tokens: int, cost: CostSurface) -> EvictionPolicy:
    """Return a new policy for a pool of `n_chunks`. Raises ValueError for another name."""
    if name == "lru":
        return LRU()
    if name == "lfu":
        return LFU()
    if name == "pgdsf":
        return FadingPGDSF(history_for(n_chunks), lambda depth: cost.relative((depth - 1) * chunk_tokens))
    raise ValueError(f"eviction must be one of {', '.join(EVICTIONS)}, not {name!r}")
