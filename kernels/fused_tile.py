# mypy: ignore-errors
# (what numba compiles is a language of its own, which type checkers cannot read)
"""A tile of keys in the fused CPU kernel: all rows of a unit pass over it.

Invariant: a key that a row may not see adds nothing to its result, whatever the pool holds there.

The tile is read where it lies, while its values are paired for the products. Then the rows pass over it, 48 at a time:
scores by the keys, weights, outputs (lanes are columns of the head). Lanes of scores are rows, so that maxima and sums
need no shuffling; for up to 4 rows they are keys, since most lanes of rows would be empty: one sequence's step.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from stemcache.kernels.row_ops import scores_of_row, softmax_of_row
from stemcache.kernels.vector_ops import (
    KEYS_AT_ONCE,
    LANES,
    ROWS_AT_ONCE,
    memory,
    outputs_of_16,
    outputs_of_32,
    outputs_of_64,
    pair_values,
    scores_of_16,
    scores_of_32,
    scores_of_48,
    softmax,
)

TILE = 64
"""Keys at a time, at most a chunk."""
ROWS = 3 * LANES
"""Rows at a time."""


@njit
def are_few(rows, head_dim):
    """Whether lanes of scores are keys. Queries are then [row, head_dim], scores and weights [row, TILE]."""
    return rows <= ROWS_AT_ONCE and head_dim % (2 * LANES) == 0


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
def _hide_scores_of_row(scores, low, high, position, first, begin, end, stop):
    """-inf for the scores of keys that a row, which sees the positions [low, high], does not see."""
    of_row = carray(memory(scores), (stop - first,), np.float32)
    for key in range(first, stop):
        if key < begin or key >= end or position + key < low or position + key > high:
            of_row[key - first] = -np.inf


@njit
def _scores(job, own, vectors, row, width, keys, n_keys, following):
    head_dim, stride, queries = job.head_dim, 4 * LANES * vectors, own.queries + 4 * row
    for key in range(0, n_keys, KEYS_AT_ONCE):
        at, scores = keys + 2 * head_dim * key, own.scores + stride * key
        ahead = following + 2 * head_dim * key if row == 0 else at
        if vectors == 3:
            scores_of_48(queries, 4 * width, at, 2 * head_dim, head_dim // 2, scores, stride, ahead)
        elif vectors == 2:
            scores_of_32(queries, 4 * width, at, 2 * head_dim, head_dim // 2, scores, stride, ahead)
        else:
            scores_of_16(queries, 4 * width, at, 2 * head_dim, head_dim // 2, scores, stride, ahead)


@njit
def _outputs(own, row, n_rows, pairs, head_dim, step, row_stride):
    """Weights of a row's pairs lie `step` apart, and of the next row `row_stride`. Rows beyond n_rows, to fill the last
    four, are computed from whatever lies there, and are nobody's."""
    for r in range(0, n_rows, ROWS_AT_ONCE):
        weights, factors = own.weights + row_stride * r, own.factors + 4 * r
        column = 0
        while column < head_dim:
            values, out = own.values + 4 * column, own.outputs + 4 * ((row + r) * head_dim + column)
            if head_dim - column >= 64:
                outputs_of_64(weights, step, row_stride, values, 4 * head_dim, pairs, out, 4 * head_dim, factors)
                column += 64
            elif head_dim - column >= 32:
                outputs_of_32(weights, step, row_stride, values, 4 * head_dim, pairs, out, 4 * head_dim, factors)
                column += 32
            else:
                outputs_of_16(weights, step, row_stride, values, 4 * head_dim, pairs, out, 4 * head_dim, factors)
                column += 16


@njit
def _pass_of_few(job, own, n_rows, masked, keys, following, position, first, begin, end, stop):
    head_dim, low, high = job.head_dim, memory(own.low), memory(own.high)
    blocks = (stop - first) // LANES
    for r in range(n_rows):
        query, scores = own.queries + 2 * r * head_dim, own.scores + 4 * r * TILE
        for i in range(blocks):
            at = keys + 2 * head_dim * LANES * i
            ahead = following + 2 * head_dim * LANES * i if r == 0 else at
            scores_of_row(query, at, 2 * head_dim, head_dim // (2 * LANES), scores + 4 * LANES * i, ahead)
        if masked:
            row_low, row_high = carray(low, (n_rows,), np.int32)[r], carray(high, (n_rows,), np.int32)[r]
            _hide_scores_of_row(scores, row_low, row_high, position, first, begin, end, stop)
        weights = own.weights + 2 * r * TILE
        scale = np.float32(job.scale)
        softmax_of_row(scores, blocks, weights, own.maxima + 4 * r, own.sums + 4 * r, own.factors + 4 * r, scale)
    _outputs(own, 0, n_rows, (stop - first) // 2, head_dim, 4, 2 * TILE)


@njit
def _pass(job, own, row, vectors, n_rows, width, masked, keys, following, position, first, begin, end, stop):
    """16 * vectors rows from `row` on, of which n_rows are there."""
    pairs = (stop - first) // 2
    _scores(job, own, vectors, row, width, keys, stop - first, following)
    if masked:
        _hide_scores(own, row, LANES * vectors, position, first, begin, end, stop)
    for at in range(0, 4 * LANES * vectors, 4 * LANES):
        softmax(
            own.scores + at, 4 * LANES * vectors, own.weights + at, pairs,
            own.maxima + 4 * row + at, own.sums + 4 * row + at, own.factors + at, np.float32(job.scale),
        )  # fmt: skip
    _outputs(own, row, n_rows, pairs, job.head_dim, 4 * LANES * vectors, 4)


@njit
def pass_tile(job, unit, own, width, keys, following, position, begin, end):
    """All rows of a unit over the keys [begin, end) of a tile whose first key has this position and lies at `keys`.

    following: where the next tile lies, which is fetched meanwhile.
    """
    head_dim, packed = job.head_dim, unit.n_rows * job.group
    few = are_few(packed, head_dim)
    block = LANES if few else KEYS_AT_ONCE
    first, stop = begin // block * block, -(-end // block) * block
    keys += 2 * head_dim * first
    values = keys + job.side, following + job.side
    pair_values(values[0], 2 * head_dim, (stop - first) // 2, own.values, head_dim // LANES, values[1])
    part = begin > first or end < stop
    if part:
        _hide_values(own.values, first, begin, end, stop, head_dim)
    masked = part or position + first < unit.full_start or position + stop > unit.full_stop
    if few:
        _pass_of_few(job, own, packed, masked, keys, following, position, first, begin, end, stop)
        return
    row = 0
    while row < width:
        left = (width - row) // LANES
        vectors = 2 if left == 4 else min(left, 3)  # 4 as 2 and 2: a single vector waits for its sums
        n_rows = min(LANES * vectors, packed - row)
        _pass(job, own, row, vectors, n_rows, width, masked, keys, following, position, first, begin, end, stop)
        row += LANES * vectors
