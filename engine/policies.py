"""The eviction policies by the names that users give them, over the engine's own cost surface."""

from __future__ import annotations

from typing import Final

from stemcache.engine.cost import CostSurface
from stemcache.prefixtree.eviction import LFU, LRU, EvictionPolicy
from stemcache.prefixtree.frequency import FrequencySketch
from stemcache.prefixtree.pgdsf import PGDSF

EVICTIONS: Final = ("lru", "lfu", "pgdsf")
QUEUES: Final = ("fcfs", "cache")

# A use is worth half after ten times as many chunks have come and gone as there is room for: TinyLFU's sample
# (arXiv 1512.00727) for a cache of that size. After four half-lives little is left of it; so many chunks must be told
# apart, or passers-by are taken for old acquaintances. In simulation (k=5, docs/policies.md) the gate hit 4.8 % of the
# documents with room for as many chunks as the pool has, 6.9 % with ten times as much, 8.1 % with forty.
HISTORY_TURNOVERS: Final = 10
HALF_LIVES: Final = 4


def history_for(n_chunks: int) -> FrequencySketch:
    """Return what PGDSF remembers of evicted chunks, for a pool of `n_chunks`: 2.5 to 5 KB for each."""
    half_life = HISTORY_TURNOVERS * n_chunks
    return FrequencySketch(HALF_LIVES * half_life, half_life)


def eviction_policy(name: str, n_chunks: int, chunk_tokens: int, cost: CostSurface) -> EvictionPolicy:
    """Return a new policy for a pool of `n_chunks`. `pgdsf` has the gate. Raises ValueError for another name."""
    if name == "lru":
        return LRU()
    if name == "lfu":
        return LFU()
    if name == "pgdsf":
        return PGDSF(lambda depth: cost.relative((depth - 1) * chunk_tokens), history_for(n_chunks), gate=True)
    raise ValueError(f"eviction must be one of {', '.join(EVICTIONS)}, not {name!r}")
