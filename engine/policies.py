"""The eviction policies by the names that users give them, over the engine's own cost surface."""

from __future__ import annotations

from typing import Final

from stemcache.engine.cost import CostSurface
from stemcache.prefixtree.eviction import LFU, LRU, EvictionPolicy
from stemcache.prefixtree.fading_pgdsf import FadingPGDSF
from stemcache.prefixtree.frequency import FrequencySketch

EVICTIONS: Final = ("lru", "lfu", "pgdsf")
QUEUES: Final = ("fcfs", "cache")

# A use is worth half after four times as many chunks have come and gone as there is room for. In simulation (k=5 in
# order of relevance, docs/policies.md) two hit 5 % fewer documents, seven 3 % more where nothing drifts; in `cache`
# order under drift all three were within 1 %. After five half-lives little is left of a use; so many chunks must be
# told apart, or passers-by are taken for old acquaintances: with room for as many chunks as the pool has 6.3 % of the
# documents were hit, 7.5 % with four times as much, 7.9 with ten, 8.1 with twenty and with forty.
HISTORY_TURNOVERS: Final = 4
HALF_LIVES: Final = 5


def history_for(n_chunks: int) -> FrequencySketch:
    """Return what PGDSF remembers of evicted chunks, for a pool of `n_chunks`: 1.3 to 2.5 KB for each."""
    half_life = HISTORY_TURNOVERS * n_chunks
    return FrequencySketch(HALF_LIVES * half_life, half_life)


def eviction_policy(name: str, n_chunks: int, chunk_tokens: int, cost: CostSurface) -> EvictionPolicy:
    """Return a new policy for a pool of `n_chunks`. Raises ValueError for another name."""
    if name == "lru":
        return LRU()
    if name == "lfu":
        return LFU()
    if name == "pgdsf":
        return FadingPGDSF(history_for(n_chunks), lambda depth: cost.relative((depth - 1) * chunk_tokens))
    raise ValueError(f"eviction must be one of {', '.join(EVICTIONS)}, not {name!r}")
