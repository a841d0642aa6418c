"""Keeping the memory that a step has freed, for the next step, and once for all threads.

Invariant: nothing but what glibc holds back changes. An allocator that was preloaded in its place is not reached.

The intermediate results of a prefill are megabytes each, and as delivered glibc gives such memory back to the system
as soon as it is free: a prompt of 1,914 tokens (SmolLM2-135M's shape, bfloat16) took 17,000 to 86,000 page faults, 2 to
8 % of its processor time, and takes 50 now. But glibc keeps it in an arena for each of up to eight threads a core, and
threads that write and load chunks free megabytes too: a process that opened 24 engines with tiers, one after another,
held 584 MiB after the first and 697 after the last, of which Python knew nothing; with one arena, 571 to 572 from
the third to the twelfth (the engines of benchmarks/soak_tiers.py, six seconds each). Python's small objects are in no
arena, so threads seldom meet there. Rejected: two arenas, with which it still grew; preloading jemalloc or tcmalloc,
which is left to the user.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

LARGEST_KEPT: Final = 64 << 20
"""Bytes of a block up to which it is kept. The chunk pool is larger, and goes back when the engine is closed."""
KEPT: Final = 128 << 20
"""Bytes at the end of a heap that are kept."""
ARENAS: Final = 1
"""How many heaps there are for threads that begin from then on; those of earlier threads stay."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc, for this process; returns whether it was told. Idempotent."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    wishes = {_M_MMAP_THRESHOLD: LARGEST_KEPT, _M_TRIM_THRESHOLD: KEPT, _M_ARENA_MAX: ARENAS}
    return all(bool(mallopt(option, value)) for option, value in wishes.items())


def give_back_freed_memory() -> bool:
    """Give what is free between what is not back to the system, but for `KEPT`; returns whether anything was.

    10 to 20 ms.

    oneDNN makes a kernel for each number of rows of a product, keeps 1,024 of them, and leaves between them what it
    made them with: after 4,200 products of 1,050 numbers of rows (SmolLM2-135M's shape, bfloat16) the process had grown
    by 3,495 MB, and had 526 left of that after this call.
    """
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None).malloc_trim(KEPT))
    except AttributeError:  # another C library
        return False
