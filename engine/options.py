"""What an engine can be told when it is made.

Invariant: every option has a default that is right for most; leaving all of them out is the common case.
"""

from __future__ import annotations

from typing import TypedDict

from stemcache.engine.cold import ColdOptions

# Large steps are cheaper: 2,080 tokens of a 135M model take 1.9 s at once, 2.3 s in steps of 512 (two cores, bf16).
# While others decode, a quarter of it or more is what they have to wait for (`Scheduler`).
MAX_STEP_TOKENS = 2048
MAX_RUNNING = 256
# Logits of prompts whose log-probabilities are asked for: 256 MiB in float32, 512 rows of a vocabulary of 131,072.
MAX_STEP_LOGITS = 1 << 26


class EngineOptions(TypedDict, total=False):
    """The keyword arguments of `Engine.load` and `Engine.from_model`.

    pool_bytes: memory for keys and values; 2 GiB by default.
    chunk_tokens: tokens per chunk, a power of two from 16 to 256; 64 by default.
    max_step_tokens: tokens of prompts that one step computes; from a quarter of it up while others decode.
    max_running: sequences that hold slots at once.
    eviction: what goes when the pool is full, by "pgdsf" (uses times cost, the default), "lru" or "lfu".
    queue: which of a tenant's requests starts first, "cache" (the one that is cached for the most part, the default) or
        "fcfs" (the first to come).
    cold: what lies below the device: host memory, disk, Redis; nothing by default.
    """

    pool_bytes: int
    chunk_tokens: int
    max_step_tokens: int
    max_running: int
    eviction: str
    queue: str
    cold: ColdOptions | None
