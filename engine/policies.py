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
# (arXiv 1512.00727) for a cache of that size.
HISTORY_TURNOVERS: Final = 10.0


def eviction_policy(name: str, n_chunks: int, chunk_tokens: int, cost: CostSurface) -> EvictionPolicy:
    """Return a new policy for a pool of `n_chunks`. `pgdsf` has the gate. Raises ValueError for another name."""
    if name == "lru":
        return LRU()
    if name == "lfu":
        return LFU()
    if name == "pgdsf":
        history = FrequencySketch(n_chunks, HISTORY_TURNOVERS * n_chunks)
        return PGDSF(lambda depth: cost.relative((depth - 1) * chunk_tokens), history, gate=True)
    raise ValueError(f"eviction must be one of {', '.join(EVICTIONS)}, not {name!r}")
