# mypy: ignore-errors
# (what numba compiles is a language of its own, which type checkers cannot read)
"""The kernel of `stages`, compiled by numba: a thread's way through a list of functions.

Invariant: a barrier lies between any two functions.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray
from numba.extending import intrinsic

from stemcache.kernels.c_functions import c_function
from stemcache.kernels.vector_ops import I64, memory, procedure

JOB = np.dtype([(name, np.int64) for name in ("n_stages", "stages", "barrier")])
"""stages: address of pairs (function, argument), addresses all. barrier: a function that takes nothing."""


def _function(e, address, *given):
    kind = ir.FunctionType(ir.VoidType(), given)
    return e.builder.inttoptr(address, kind.as_pointer())


@intrinsic
def _call(context, address, argument):
    def emit(e, address, argument):
        e.builder.call(_function(e, address, I64), [argument])

    return procedure(emit, address, argument)


@intrinsic
def _wait(context, address):
    def emit(e, address):
        e.builder.call(_function(e, address), [])

    return procedure(emit, address)


@cache
def compiled():
    """The C function `void run_in_turn(JOB *)`, which every thread of a team calls."""

    def run_in_turn(jobs):
        job = carray(jobs, 1)[0]
        stages = carray(memory(job.stages), (job.n_stages, 2), np.int64)
        for i in range(job.n_stages):
            if i:
                _wait(job.barrier)
            _call(stages[i, 0], stages[i, 1])

    return c_function(JOB, run_in_turn)
