"""Compiled functions that one team of threads runs in turn.

Invariant: no thread begins a stage before all have left the one before.

From Python each function would be a call, an argument to fill in and a team to wake: 10 to 20 us, where the functions
between a decode step's products compute for one. So a layer is written down as stages first, and then run at once.
"""

from __future__ import annotations

import ctypes
from functools import cache

from stemcache.kernels import openmp


class Job(ctypes.Structure):
    """The argument of a function. Its first field is `counters`: the address of four int64 that are 0 when a run
    begins, from which the threads take numbers of work."""

    counters: int


class Stages:
    """Functions and their arguments, in turn. They can be run any number of times, each time once at a time."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._numbers: list[int] = []
        self._kept: list[object] = []
        self._table = self._counters = (ctypes.c_int64 * 0)()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, function: int, job: Job, *kept: object) -> None:
        """One more: the address of a C function `void f(Job *)` that shares out its work among the threads that call
        it, and what it is called with. kept: what the job's own addresses point to."""
        self._jobs.append(job)
        self._numbers += [function, ctypes.addressof(job)]
        self._kept.append(kept)

    def run(self, threads: int) -> None:
        """Run them in turn, each on at most so many threads. Returns when all have ended."""
        if len(self._table) != len(self._numbers):
            self._prepare()
        ctypes.memset(self._counters, 0, ctypes.sizeof(self._counters))
        if len(self) == 1:
            openmp.run(self._numbers[0], self._numbers[1], threads)
        elif self._jobs:
            way = (ctypes.c_int64 * 3)(len(self), ctypes.addressof(self._table), openmp.barrier())
            openmp.run(_in_turn(), ctypes.addressof(way), threads)

    def _prepare(self) -> None:
        """Lay down what is the same in each run: the table that the threads go by, and memory for the counters, all in
        one place, to be cleared at once."""
        self._table = (ctypes.c_int64 * len(self._numbers))(*self._numbers)
        self._counters = (ctypes.c_int64 * (4 * len(self)))()
        for i, job in enumerate(self._jobs):
            job.counters = ctypes.addressof(self._counters) + 4 * 8 * i


@cache
def _in_turn() -> int:
    from stemcache.kernels.stages_kernel import compiled

    return int(compiled().address)
