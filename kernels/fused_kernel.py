# mypy: ignore-errors
# (what numba compiles is a language of its own, which type checkers cannot read)
"""The fused CPU kernel: scores, softmax and outputs of a unit in one pass over its keys, compiled by numba.

Invariant: a key that a row may not see never reaches its result, whatever the pool holds there. Scores and sums are
float32, factors of products bfloat16, as in PyTorch's flash kernel.

A tile of 64 keys is read where it lies, while its values are paired for the products, and then all rows of the unit
pass over it, 48 at a time: scores by the keys (lanes are rows, so that maxima and sums need no shuffling), weights,
outputs (lanes are columns of the head). All threads run the two functions at the end, and take numbers of work from
counters until there are none.
"""

from __future__ import annotations

from collections import namedtuple
from functools import cache

import numpy as np
from numba import carray, njit

from stemcache.kernels import vector_ops
from stemcache.kernels.c_functions import c_function, edition
from stemcache.kernels.fused import AttentionJob
from stemcache.kernels.fused_units import UNIT
from stemcache.kernels.vector_ops import (
    KEYS_AT_ONCE,
    LANES,
    NO_SCORE,
    ROWS_AT_ONCE,
    memory,
    outputs_of_16,
    outputs_of_32,
    outputs_of_64,
    pair_values,
    prefetch,
    scores_of_16,
    scores_of_32,
    scores_of_48,
    softmax,
    store_rounded,
    take_number,
)

TILE = 64
"""Keys at a time, at most a chunk."""
ROWS = 3 * LANES
"""Rows at a time."""

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
    """Lay the unit's queries out as [pair, row], with zeros up to `width` rows, and clear its results."""
    pairs = job.head_dim // 2
    packed = carray(memory(own.queries), (pairs, width), np.uint32)
    low, high = carray(memory(own.low), (width,), np.int32), carray(memory(own.high), (width,), np.int32)
    last_row = unit.first_row + unit.n_rows
    rows, positions = carray(memory(job.rows), (last_row,), np.int64), carray(memory(job.positions), (1,), np.int64)
    for r in range(unit.n_rows * job.group, width):
        low[r], high[r] = 0, 0
        for pair in range(pairs):
            packed[pair, r] = 0
    r = 0
    for i in range(unit.first_row, last_row):
        row = rows[i]
        position = positions[row]
        for h in range(head * job.group, (head + 1) * job.group):
            query = carray(memory(job.query + row * job.query_row + h * job.query_head), (pairs,), np.uint32)
            for pair in range(pairs):
                packed[pair, r] = query[pair]
            low[r], high[r] = position - job.window + 1 if job.window else 0, position
            r += 1
    maxima, sums = carray(memory(own.maxima), (width,), np.float32), carray(memory(own.sums), (width,), np.float32)
    maxima[:], sums[:] = NO_SCORE, 0
    outputs = carray(memory(own.outputs), (width * job.head_dim,), np.float32)
    outputs[:] = 0


@njit
def _hide_values(paired, first, begin, end, stop, head_dim):
    """Zeros for the tile's values outside [begin, end): nothing, times a weight of zero, is nothing."""
    halves = carray(memory(paired), ((stop - first) // 2, head_dim, 2), np.uint16)
    for key in range(first, stop):
        if key < begin or key >= end:
            halves[(key - first) // 2, :, (key - first) % 2] = 0


@njit
def _hide_scores(own, row, n_rows, position, first, begin, end, stop):
    """-inf for the scores of keys that a row does not see."""
    low = carray(memory(own.low + 4 * row), (n_rows,), np.int32)
    high = carray(memory(own.high + 4 * row), (n_rows,), np.int32)
    scores = carray(memory(own.scores), (stop - first, n_rows), np.float32)
    for key in range(first, stop):
        outside = key < begin or key >= end
        for r in range(n_rows):
            if outside or position + key < low[r] or position + key > high[r]:
                scores[key - first, r] = -np.inf


@njit
def _scores(own, vectors, row, width, keys, n_keys, head_dim, following, side):
    stride, queries = 4 * LANES * vectors, own.queries + 4 * row
    for key in range(0, n_keys, KEYS_AT_ONCE):
        at, scores = keys + 2 * head_dim * key, own.scores + stride * key
        if row == 0:
            prefetch(following + 2 * head_dim * key, 2 * head_dim * KEYS_AT_ONCE)
            prefetch(following + side + 2 * head_dim * key, 2 * head_dim * KEYS_AT_ONCE)
        if vectors == 3:
            scores_of_48(queries, 4 * width, at, 2 * head_dim, head_dim // 2, scores, stride)
        elif vectors == 2:
            scores_of_32(queries, 4 * width, at, 2 * head_dim, head_dim // 2, scores, stride)
        else:
            scores_of_16(queries, 4 * width, at, 2 * head_dim, head_dim // 2, scores, stride)


@njit
def _outputs(own, vectors, row, n_rows, pairs, head_dim):
    stride = 4 * LANES * vectors
    for r in range(0, n_rows, ROWS_AT_ONCE):
        weights, factors = own.weights + 4 * r, own.factors + 4 * r
        column = 0
        while column < head_dim:
            values, out = own.values + 4 * column, own.outputs + 4 * ((row + r) * head_dim + column)
            if head_dim - column >= 64:
                outputs_of_64(weights, stride, values, 4 * head_dim, pairs, out, 4 * head_dim, factors)
                column += 64
            elif head_dim - column >= 32:
                outputs_of_32(weights, stride, values, 4 * head_dim, pairs, out, 4 * head_dim, factors)
                column += 32
            else:
                outputs_of_16(weights, stride, values, 4 * head_dim, pairs, out, 4 * head_dim, factors)
                column += 16


@njit
def _tile(job, unit, own, width, keys, following, position, begin, end):
    """All rows of a unit over the keys [begin, end) of a tile whose first key has this position and lies at `keys`."""
    head_dim = job.head_dim
    first, stop = begin // KEYS_AT_ONCE * KEYS_AT_ONCE, -(-end // KEYS_AT_ONCE) * KEYS_AT_ONCE
    keys += 2 * head_dim * first
    pairs = (stop - first) // 2
    pair_values(keys + job.side, 2 * head_dim, pairs, own.values, head_dim // LANES)
    part = begin > first or end < stop
    if part:
        _hide_values(own.values, first, begin, end, stop, head_dim)
    masked = part or position + first < unit.full_start or position + stop > unit.full_stop
    row = 0
    while row < width:
        left = (width - row) // LANES
        vectors = 2 if left == 4 else min(left, 3)  # 4 as 2 and 2: a single vector waits for its sums
        _scores(own, vectors, row, width, keys, stop - first, head_dim, following, job.side)
        if masked:
            _hide_scores(own, row, LANES * vectors, position, first, begin, end, stop)
        for at in range(0, 4 * LANES * vectors, 4 * LANES):
            softmax(
                own.scores + at, 4 * LANES * vectors, own.weights + at, pairs,
                own.maxima + 4 * row + at, own.sums + 4 * row + at, own.factors + at, np.float32(job.scale),
            )  # fmt: skip
        _outputs(own, vectors, row, min(LANES * vectors, unit.n_rows * job.group - row), pairs, head_dim)
        row += LANES * vectors


@njit
def _attend(job, unit, head, own):
    width = -(-unit.n_rows * job.group // LANES) * LANES
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
                _tile(job, unit, own, width, keys, following, position, begin, end)
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
    them on disk until this file or that of the vector instructions changes."""
    text = edition(vector_ops)

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
