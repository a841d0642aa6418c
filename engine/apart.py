"""Work on a thread that ends with it, so that the engine's thread has the process's only team of OpenMP threads.

Invariant: what is returned or raised is what the function returns or raises.

libgomp gives each thread that computes in parallel a team of its own, which lives as long as that thread. With more
threads in teams than processors, a team's threads no longer spin for the next product but sleep (libgomp, wait.h:
`gomp_managed_threads > gomp_available_cpus`), and are woken for each. A model that the main thread had loaded left a
team there: a decode step of 8 sequences over 2,048 shared tokens (SmolLM2-135M's shape, bfloat16, two threads of a
Zen 4) took 85 to 101 ms, and 56 to 75 without it; one thread alone took 75 to 91. Rejected: `omp_pause_resource_all`,
which does as much, by way of ctypes; loading on the engine's thread, which would begin before there is anything to run.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def apart(function: Callable[[], T]) -> T:
    """Call a function on a thread of its own, and wait for it."""
    with ThreadPoolExecutor(1, thread_name_prefix="stemcache-load") as thread:
        return thread.submit(function).result()
