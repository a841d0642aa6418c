"""Compiled functions that one team of threads runs in turn.

Invariant: no thread begins a stage before all have left the one before.

From Python each function would be a call, an argument to fill in and a team to wake: 10 to 20 us, where the functions
between a decode step's products compute for one. So a layer is written down as stages first, and then run at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from stemcache.kernels import openmp


class Stage(NamedTuple):
    """A C function `void f(void *)` that shares out its work among the threads that call it.

    function, argument: addresses. kept: what lies there.
    """

    function: int
    argument: int
    kept: object


def run_stages(stages: Sequence[Stage], threads: int) -> None:
    """Run stages in turn, each on at most so many threads. Returns when all have ended."""
    if len(stages) == 1:
        openmp.run(stages[0].function, stages[0].argument, threads)
        return
    table = (ctypes.c_int64 * (2 * len(stages)))(*(number for stage in stages for number in stage[:2]))
    job = (ctypes.c_int64 * 3)(len(stages), ctypes.addressof(table), openmp.barrier())
    openmp.run(_in_turn(), ctypes.addressof(job), threads)


@cache
def _in_turn() -> int:
    from stemcache.kernels.stages_kernel import compiled

    return int(compiled().address)
