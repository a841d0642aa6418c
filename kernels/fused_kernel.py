# mypy: ignore-errors
# (what numba compiles is a language of its own, which type checkers cannot read)
"""The fused CPU kernel: scores, softmax and outputs of a unit in one pass over its keys, compiled by numba.

Invariant: a key that a row may not see never reaches its result, whatever the pool holds there. Scores and sums are
float32, factors of products bfloat16, as in PyTorch's flash kernel.

All rows of a unit pass over its keys tile by tile (`fused_tile`). All threads run the two functions at the end, and
take numbers of work from counters until there are none.
"""

from __future__ import annotations

from collections import namedtuple
from functools import cache

import numpy as np
from numba import carray, njit

from stemcache.kernels import fused_tile, row_ops, vector_ops
from stemcache.kernels.c_functions import c_function, edition
from stemcache.kernels.fused import AttentionJob
from stemcache.kernels.fused_tile import ROWS, TILE, are_few, pass_tile
from stemcache.kernels.fused_units import UNIT
from stemcache.kernels.vector_ops import LANES, NO_SCORE, ROWS_AT_ONCE, memory, store_rounded, take_number

JOB = np.dtype(AttentionJob)

Scratch = namedtuple("Scratch", "queries outputs maxima sums low high factors scores weights values")


def scratch_size(width: int, head_dim: int) -> int:
    """Bytes of a thread's scratch memory for units of `width` packed rows, a multiple of 16."""
    return 4 * (width * (head_dim // 2 + head_dim + 4) + ROWS * (1 + TILE + TILE // 2) + TILE // 2 * head_dim) + 1024


@njit
def _scratch(job, counter):
    width = job.width
    at = job.scratch + take_number(counter) * job.scratch_size
    queries, at = at, at + 2 * width * job.head_dim
    outputs, at = at, at + 4 * width * job.head_dim
    maxima, sums, low, high, at = at, at + 4 * width, at + 8 * width, at + 12 * width, at + 16 * width
    factors, at = at, at + 4 * ROWS
    scores, at = at, at + 4 * ROWS * TILE
    weights, at = at, at + 2 * ROWS * TILE
    return Scratch(queries, outputs, maxima, sums, low, high, factors, scores, weights, at)


@njit
def _begin(job, unit, head, width, own):
    """Lay the unit's queries out as its tiles want them, with zeros up to `width` rows, and clear its results."""
    pairs, few = job.head_dim // 2, are_few(unit.n_rows * job.group, job.head_dim)
    step, row_step = (1, pairs) if few else (width, 1)  # from a pair to the next, and from a row
    laid = carray(memory(own.queries), (pairs * width,), np.uint32)
    low, high = carray(memory(own.low), (width,), np.int32), carray(memory(own.high), (width,), np.int32)
    last_row = unit.first_row + unit.n_rows
    rows, positions = carray(memory(job.rows), (last_row,), np.int64), carray(memory(job.positions), (1,), np.int64)
    for r in range(unit.n_rows * job.group, width):
        low[r], high[r] = 0, 0
        for pair in range(pairs):
            laid[pair * step + r * row_step] = 0
    r = 0
    for i in range(unit.first_row, last_row):
        row = rows[i]
        position = positions[row]
        for h in range(head * job.group, (head + 1) * job.group):
            query = carray(memory(job.query + row * job.query_row + h * job.query_head), (pairs,), np.uint32)
            for pair in range(pairs):
                laid[pair * step + r * row_step] = query[pair]
            low[r], high[r] = position - job.window + 1 if job.window else 0, position
            r += 1
    maxima, sums = carray(memory(own.maxima), (width,), np.float32), carray(memory(own.sums), (width,), np.float32)
    maxima[:], sums[:] = NO_SCORE, 0
    outputs = carray(memory(own.outputs), (width * job.head_dim,), np.float32)
    outputs[:] = 0


@njit
def _attend(job, unit, head, own):
    packed = unit.n_rows * job.group
    width = ROWS_AT_ONCE if are_few(packed, job.head_dim) else -(-packed // LANES) * LANES
    _begin(job, unit, head, width, own)
    size, tile = job.chunk_tokens, min(job.chunk_tokens, TILE)
    n_chunks = (unit.stop - 1) // size - unit.start // size + 1
    chunks = carray(memory(job.chunks + 8 * unit.first_chunk), (n_chunks,), np.int64)
    position = unit.start // size * size
    pool = job.pool + head * job.head_side
    for i in range(n_chunks):
        at = pool + 2 * chunks[i] * size * job.head_dim
        for offset in range(0, size, tile):
            begin, end = max(unit.start - position, 0), min(unit.stop - position, tile)
            if begin < end:
                keys = at + 2 * offset * job.head_dim
                if offset + tile < size:
                    following = keys + 2 * tile * job.head_dim
                else:
                    following = pool + 2 * chunks[min(i + 1, n_chunks - 1)] * size * job.head_dim
                pass_tile(job, unit, own, width, keys, following, position, begin, end)
            position += tile
    _end(job, unit, head, own)


@njit
def _end(job, unit, head, own):
    """Write the rows' results, or what will be merged of them."""
    q_heads, head_dim = job.kv_heads * job.group, job.head_dim
    rows = carray(memory(job.rows + 8 * unit.first_row), (unit.n_rows,), np.int64)
    packed = unit.n_rows * job.group
    maxima, sums = carray(memory(own.maxima), (packed,), np.float32), carray(memory(own.sums), (packed,), np.float32)
    for r in range(packed):
        h = head * job.group + r % job.group
        if unit.partial < 0:
            total = sums[r]
            if job.sinks:
                total += np.exp2(carray(memory(job.sinks), (q_heads,), np.float32)[h] - maxima[r])
            out = job.out + 2 * (rows[r // job.group] * q_heads + h) * head_dim
            store_rounded(own.outputs + 4 * r * head_dim, np.float32(1) / total, out, head_dim // LANES)
            continue
        part = (unit.partial + r // job.group) * q_heads + h
        carray(memory(job.maxima), (part + 1,), np.float32)[part] = maxima[r]
        carray(memory(job.sums), (part + 1,), np.float32)[part] = sums[r]
        partial = carray(memory(job.partials + 4 * part * head_dim), (head_dim,), np.float32)
        partial[:] = carray(memory(own.outputs + 4 * r * head_dim), (head_dim,), np.float32)


@njit
def _merge(job, i, own):
    """Combine a row's partial results: their sums and outputs are relative to their maxima."""
    q_heads, head_dim = job.kv_heads * job.group, job.head_dim
    row = carray(memory(job.merged_rows), (i + 1,), np.int64)[i]
    begin = carray(memory(job.merged_begin), (i + 2,), np.int64)
    parts = carray(memory(job.merged_partials + 8 * begin[i]), (begin[i + 1] - begin[i],), np.int64)
    merged = carray(memory(own.outputs), (head_dim,), np.float32)
    for h in range(q_heads):
        maximum = np.float32(NO_SCORE)
        for part in parts:
            maximum = max(maximum, carray(memory(job.maxima), (1,), np.float32)[part * q_heads + h])
        total = np.float32(0)
        if job.sinks:
            total = np.exp2(carray(memory(job.sinks), (q_heads,), np.float32)[h] - maximum)
        merged[:] = 0
        for part in parts:
            at = part * q_heads + h
            weight = np.exp2(carray(memory(job.maxima), (at + 1,), np.float32)[at] - maximum)
            total += weight * carray(memory(job.sums), (at + 1,), np.float32)[at]
            partial = carray(memory(job.partials + 4 * at * head_dim), (head_dim,), np.float32)
            for d in range(head_dim):
                merged[d] += weight * partial[d]
        store_rounded(
            own.outputs, np.float32(1) / total, job.out + 2 * (row * q_heads + h) * head_dim, head_dim // LANES
        )


@cache
def compiled():
    """The C functions `void attend_units(JOB *)` and `void merge_rows(JOB *)`: compiled once a machine, as numba keeps
    them on disk until this file or those of a tile and of the vector instructions change."""
    text = edition(vector_ops, row_ops, fused_tile)

    def attend_units(jobs):
        _ = text
        job = carray(jobs, 1)[0]
        units = carray(memory(job.units), (job.n_units,), UNIT)
        own = _scratch(job, job.counters + 8)
        while True:
            i = take_number(job.counters)
            if i >= job.n_units * job.kv_heads:
                break
            _attend(job, units[i // job.kv_heads], i % job.kv_heads, own)

    def merge_rows(jobs):
        _ = text
        job = carray(jobs, 1)[0]
        own = _scratch(job, job.counters + 24)
        while True:
            i = take_number(job.counters + 16)
            if i >= job.n_merged:
                break
            _merge(job, i, own)

    return c_function(JOB, attend_units), c_function(JOB, merge_rows)
