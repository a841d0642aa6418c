# mypy: ignore-errors
# (what numba compiles is a language of its own, which type checkers cannot read)
"""The kernel of `products`, compiled by numba: a block of rows with a range of a weight's columns at a time.

Invariant: within a range weights are read in the order in which they lie, once for each four rows of a block; sums are
float32, always over the inputs in their order.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray, njit

from stemcache.kernels import product_ops, vector_ops
from stemcache.kernels.c_functions import c_function, edition
from stemcache.kernels.product_ops import ROWS_AT_ONCE, columns_of_32, columns_of_64, dots
from stemcache.kernels.products import PANEL, ProductJob
from stemcache.kernels.vector_ops import LANES, take_number

JOB = np.dtype(ProductJob)


def _by_rows(functions):
    """One function for one to four rows."""
    one, two, three, four = functions

    @njit
    def function(rows, *given):
        if rows == 4:
            four(*given)
        elif rows == 3:
            three(*given)
        elif rows == 2:
            two(*given)
        else:
            one(*given)

    return function


_of_64, _of_32, _of_16_plain = map(_by_rows, (columns_of_64, columns_of_32, dots))


@njit
def _ahead(group, n_rows, following, own):
    """The lines of the next panel (0: none) that a group of rows fetches, of each pair of inputs two addresses.

    Without that its first group waits for memory, and the others for nothing but their sums. Four groups share the four
    lines, so that memory has their time to bring them; a single one reads as fast as memory brings them anyhow. Who has
    nothing to fetch names a line that it reads.
    """
    line = 64
    if following and n_rows > 3 * ROWS_AT_ONCE and group < 4:
        return following + group * line, following + group * line
    if following and ROWS_AT_ONCE < n_rows <= 3 * ROWS_AT_ONCE and group < 2:
        return following + 2 * group * line, following + (2 * group + 1) * line
    return own, own


@njit
def _multiply(job, first, last, column, end):
    """Rows [first, last) with columns [column, end), multiples of 32."""
    inputs, stride, out_stride = job.inputs, 2 * job.inputs, 2 * job.columns
    while column < end:
        in_panel = column % PANEL
        if job.panel_bytes:
            columns, weights = min(PANEL - in_panel, end - column), column // PANEL * job.panel_bytes + 4 * in_panel
        else:
            columns, weights = LANES, column * stride
        weights += job.weights
        bias = job.bias + 4 * column
        following = weights + job.panel_bytes if column + columns < end else 0
        for row in range(first, last, ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, last - row)
            ahead, other = _ahead((row - first) // ROWS_AT_ONCE, last - first, following, weights)
            hidden, out = job.hidden + row * stride, job.out + row * out_stride + 2 * column
            if columns == PANEL:
                _of_64(rows, hidden, stride, weights, inputs // 2, bias, out, out_stride, ahead, other)
            elif columns == 32:
                _of_32(rows, hidden, stride, weights, inputs // 2, bias, out, out_stride, ahead, other)
            else:
                _of_16_plain(rows, hidden, stride, weights, inputs // (2 * LANES), bias, out, out_stride)
        column += columns


@cache
def compiled():
    """The C function `void multiply(JOB *)`, which every thread of a team calls: compiled once a machine, as numba
    keeps it on disk until this file or those of the vector instructions change."""
    text = edition(vector_ops, product_ops)

    def multiply(jobs):
        _ = text
        job = carray(jobs, 1)[0]
        units, n_parts = job.columns // 32, job.parts * -(-job.n_rows // job.block)
        while True:
            i = take_number(job.counters)
            if i >= n_parts:
                break
            first, part = i // job.parts * job.block, i % job.parts
            begin, end = part * units // job.parts * 32, (part + 1) * units // job.parts * 32
            _multiply(job, first, min(first + job.block, job.n_rows), begin, end)

    return c_function(JOB, multiply)
