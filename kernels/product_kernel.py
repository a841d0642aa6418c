# mypy: ignore-errors
# (what numba compiles is a language of its own, which type checkers cannot read)
"""The kernel of `products`, compiled by numba: a block of rows with a range of a weight's columns at a time.

Invariant: within a range weights are read in the order in which they lie, once for each four rows of a block; sums are
float32, always over the inputs in their order.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types

from stemcache.kernels import product_ops, vector_ops
from stemcache.kernels.product_ops import ROWS_AT_ONCE, address_of, columns_of_32, columns_of_64, dots
from stemcache.kernels.vector_ops import LANES, take_number

JOB = np.dtype(
    [(name, np.int64) for name in ("hidden", "n_rows", "out", "weights", "bias")]
    + [(name, np.int64) for name in ("inputs", "columns", "panel_bytes", "parts", "block", "taken")]
)
"""hidden (bfloat16), out (bfloat16), weights, bias (float32) are addresses. panel_bytes: of a panel of 64 columns, 0
where the weight is plain. parts: ranges that the columns are cut into. block: rows at a time. taken: 0."""
_TAKEN = JOB.fields["taken"][1]

one_of_64, two_of_64, three_of_64, four_of_64 = columns_of_64
one_of_32, two_of_32, three_of_32, four_of_32 = columns_of_32
one_dot, two_dots, three_dots, four_dots = dots


@njit
def _of_64(rows, hidden, weights, inputs, bias, out, stride):
    if rows == 4:
        four_of_64(hidden, 2 * inputs, weights, inputs // 2, bias, out, stride)
    elif rows == 3:
        three_of_64(hidden, 2 * inputs, weights, inputs // 2, bias, out, stride)
    elif rows == 2:
        two_of_64(hidden, 2 * inputs, weights, inputs // 2, bias, out, stride)
    else:
        one_of_64(hidden, 2 * inputs, weights, inputs // 2, bias, out, stride)


@njit
def _of_32(rows, hidden, weights, inputs, bias, out, stride):
    if rows == 4:
        four_of_32(hidden, 2 * inputs, weights, inputs // 2, bias, out, stride)
    elif rows == 3:
        three_of_32(hidden, 2 * inputs, weights, inputs // 2, bias, out, stride)
    elif rows == 2:
        two_of_32(hidden, 2 * inputs, weights, inputs // 2, bias, out, stride)
    else:
        one_of_32(hidden, 2 * inputs, weights, inputs // 2, bias, out, stride)


@njit
def _of_16_plain(rows, hidden, weights, inputs, bias, out, stride):
    vectors = inputs // (2 * LANES)
    if rows == 4:
        four_dots(hidden, weights, 2 * inputs, vectors, bias, out, stride)
    elif rows == 3:
        three_dots(hidden, weights, 2 * inputs, vectors, bias, out, stride)
    elif rows == 2:
        two_dots(hidden, weights, 2 * inputs, vectors, bias, out, stride)
    else:
        one_dot(hidden, weights, 2 * inputs, vectors, bias, out, stride)


@njit
def _multiply(job, first, last, column, end):
    """Rows [first, last) with columns [column, end), multiples of 32."""
    inputs, stride = job.inputs, 2 * job.columns
    while column < end:
        in_panel = column % 64
        if job.panel_bytes:
            columns, weights = min(64 - in_panel, end - column), column // 64 * job.panel_bytes + 4 * in_panel
        else:
            columns, weights = LANES, 2 * column * inputs
        weights += job.weights
        bias = job.bias + 4 * column
        for row in range(first, last, ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, last - row)
            hidden, out = job.hidden + 2 * row * inputs, job.out + row * stride + 2 * column
            if columns == 64:
                _of_64(rows, hidden, weights, inputs, bias, out, stride)
            elif columns == 32:
                _of_32(rows, hidden, weights, inputs, bias, out, stride)
            else:
                _of_16_plain(rows, hidden, weights, inputs, bias, out, stride)
        column += columns


@cache
def compiled():
    """The C function `void multiply(JOB *)`, which every thread of a team calls: compiled once a machine, as numba
    keeps it on disk until this file or those of the vector instructions change."""
    edition = crc32(Path(vector_ops.__file__).read_bytes() + Path(product_ops.__file__).read_bytes())

    def multiply(jobs):
        _ = edition
        job = carray(jobs, 1)[0]
        units, n_parts = job.columns // 32, job.parts * -(-job.n_rows // job.block)
        while True:
            i = take_number(address_of(jobs) + _TAKEN)
            if i >= n_parts:
                break
            first, part = i // job.parts * job.block, i % job.parts
            begin, end = part * units // job.parts * 32, (part + 1) * units // job.parts * 32
            _multiply(job, first, min(first + job.block, job.n_rows), begin, end)

    signature = types.void(types.CPointer(from_dtype(JOB)))
    try:
        return cfunc(signature, cache=True, error_model="numpy")(multiply)
    except RuntimeError:  # no folder to keep it in: neither beside this file nor in the user's cache
        return cfunc(signature, error_model="numpy")(multiply)
