# mypy: ignore-errors
# (what numba compiles is a language of its own, which type checkers cannot read)
"""The vector instructions of products with few rows, as functions that numba can call (see `vector_ops`).

Invariant: addresses and strides are numbers of bytes; a row's result does not depend on how many rows there are.
"""

from __future__ import annotations

from numba.core import cgutils
from numba.extending import intrinsic

from stemcache.kernels.products import PANEL
from stemcache.kernels.vector_ops import FLOATS, I32, I64, LANES, PAIRS, procedure

ROWS_AT_ONCE = 4
"""Rows of a block: with 4 vectors these are 16 sums."""
WEIGHTS_AT_ONCE = 4
"""Rows of a plain weight at once, beside as many rows of the input."""


def _columns(rows, vectors):
    @intrinsic
    def function(context, hidden, hidden_stride, weights, pairs, bias, out, out_stride, ahead, other):
        """out[row, d] = bias[d] + sum over pairs of hidden[row, pair] . weights[pair, d], rounded to bfloat16, for
        16 * vectors columns d of a panel."""

        def emit(e, hidden, hidden_stride, weights, pairs, bias, out, out_stride, ahead, other):
            panel = I64(4 * PANEL)
            start = [e.load(e.at(bias, v, 4 * LANES), FLOATS) for v in range(vectors)]
            totals = [[e.variable(value) for value in start] for _ in range(rows)]
            e.multiply(totals, pairs, hidden, I64(4), hidden_stride, weights, panel, ((ahead, panel), (other, panel)))
            for i, of_row in enumerate(totals):
                for v, total in enumerate(of_row):
                    e.store_rounded(e.builder.load(total), e.at(e.at(out, i, out_stride), v, 2 * LANES))

        return procedure(emit, hidden, hidden_stride, weights, pairs, bias, out, out_stride, ahead, other)

    return function


columns_of_64 = [_columns(rows, 4) for rows in range(1, ROWS_AT_ONCE + 1)]
columns_of_32 = [_columns(rows, 2) for rows in range(1, ROWS_AT_ONCE + 1)]


def _dots(rows):
    @intrinsic
    def function(context, hidden, stride, weights, vectors, bias, out, out_stride):
        """out[row, n] = bias[n] + hidden[row] . weights[n], rounded to bfloat16, for 16 rows n of a plain weight; rows
        of both are 16 * vectors pairs, `stride` apart. The next 16 weights are fetched meanwhile."""

        def emit(e, hidden, stride, weights, vectors, bias, out, out_stride):
            results = [e.variable(e.load(bias, FLOATS)) for _ in range(rows)]
            for first in range(0, LANES, WEIGHTS_AT_ONCE):
                totals = [[e.variable(e.constant(0.0)) for _ in range(rows)] for _ in range(WEIGHTS_AT_ONCE)]
                with cgutils.for_range(e.builder, vectors) as loop:
                    at = e.mul(loop.index, I64(4 * LANES))
                    own = [e.load(e.add(e.at(hidden, i, stride), at), PAIRS) for i in range(rows)]
                    for n, of_weight in enumerate(totals):
                        weight = e.load(e.add(e.at(weights, first + n, stride), at), PAIRS)
                        e.prefetch(e.add(e.at(weights, first + n + LANES, stride), at))
                        for total, pairs in zip(of_weight, own, strict=True):
                            e.add_products(total, pairs, weight)
                for n, of_weight in enumerate(totals):
                    for result, total in zip(results, of_weight, strict=True):
                        _add_to_lane(e, result, I32(first + n), e.sum_of_lanes(e.builder.load(total)))
            for i, result in enumerate(results):
                e.store_rounded(e.builder.load(result), e.at(out, i, out_stride))

        return procedure(emit, hidden, stride, weights, vectors, bias, out, out_stride)

    return function


dots = [_dots(rows) for rows in range(1, ROWS_AT_ONCE + 1)]


def _add_to_lane(e, variable, lane, value):
    vector = e.builder.load(variable)
    value = e.fadd(e.builder.extract_element(vector, lane), value)
    e.builder.store(e.builder.insert_element(vector, value, lane), variable)
