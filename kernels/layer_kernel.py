# mypy: ignore-errors
# (what numba compiles is a language of its own, which type checkers cannot read)
"""The kernels of `layer_parts`, compiled by numba: rows in blocks, which threads take as they come.

Invariant: a row is read and written by one thread only.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray, njit

from stemcache.kernels import layer_ops, vector_ops
from stemcache.kernels.c_functions import c_function, edition
from stemcache.kernels.layer_ops import add, gate_by_gelu, gate_by_silu, normalise, normalise_above_one, rotate
from stemcache.kernels.layer_parts import GateJob, NormJob, RotationJob, SumJob
from stemcache.kernels.vector_ops import LANES, memory, take_number


@njit
def _blocks(counter, size, count):
    """What a thread is to do of `count` rows: (first, stop) of blocks of `size`, as it comes to take them."""
    while True:
        first = take_number(counter) * size
        if first >= count:
            return
        yield first, min(first + size, count)


@njit
def _append(job, row, keys):
    """One row's keys, turned, and its values into the pool."""
    size, places = 2 * job.head_dim, carray(memory(job.slots), (job.n_rows,), np.int64)
    values, into = keys + job.kv_heads * size, job.pool + places[row] * size
    blocks = job.head_dim // (2 * LANES)
    for head in range(job.kv_heads):
        key = into + head * job.head_side
        if job.cos:
            rotate(keys + head * size, job.cos + row * size, job.sin + row * size, key, blocks)
        else:
            _copy(keys + head * size, key, size)
        _copy(values + head * size, key + job.side, size)


@njit
def _copy(source, target, size):
    carray(memory(target), (size // 4,), np.uint32)[:] = carray(memory(source), (size // 4,), np.uint32)


@cache
def compiled():
    """The C functions `void f(NormJob *)` and so on, which every thread of a team calls: compiled once a machine, as
    numba keeps them on disk until this file or those of the vector instructions change."""
    text = edition(vector_ops, layer_ops)

    def normalise_rows(jobs):
        _ = text
        job = carray(jobs, 1)[0]
        for first, stop in _blocks(job.counters, job.block, job.n_rows):
            for row in range(first, stop):
                for head in range(job.heads):
                    at, epsilon = row * job.stride + 2 * head * job.width, np.float32(job.epsilon)
                    if job.is_above_one:
                        normalise_above_one(job.rows + at, job.weight, job.out + at, job.width // LANES, epsilon)
                    else:
                        normalise(job.rows + at, job.weight, job.out + at, job.width // LANES, epsilon)

    def rotate_rows(jobs):
        _ = text
        job = carray(jobs, 1)[0]
        size, blocks = 2 * job.head_dim, job.head_dim // (2 * LANES)
        for first, stop in _blocks(job.counters, job.block, job.n_rows):
            for row in range(first, stop):
                at = job.rows + row * (job.q_heads + 2 * job.kv_heads) * size
                if job.cos:
                    for head in range(job.q_heads):
                        own = at + head * size
                        rotate(own, job.cos + row * size, job.sin + row * size, own, blocks)
                _append(job, row, at + job.q_heads * size)

    def gate_rows(jobs):
        _ = text
        job = carray(jobs, 1)[0]
        size, blocks = 2 * job.width, job.width // LANES
        for first, stop in _blocks(job.counters, job.block, job.n_rows):
            for row in range(first, stop):
                at = job.rows + 2 * row * size
                if job.is_gelu:
                    gate_by_gelu(at, at + size, job.out + row * size, blocks)
                else:
                    gate_by_silu(at, at + size, job.out + row * size, blocks)

    def add_numbers(jobs):
        _ = text
        job = carray(jobs, 1)[0]
        for first, stop in _blocks(job.counters, job.block, job.count):
            blocks = (stop - first) // LANES
            add(job.rows + 2 * first, job.to + 2 * first, blocks)

    return (
        c_function(np.dtype(NormJob), normalise_rows),
        c_function(np.dtype(RotationJob), rotate_rows),
        c_function(np.dtype(GateJob), gate_rows),
        c_function(np.dtype(SumJob), add_numbers),
    )
