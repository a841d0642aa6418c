# mypy: ignore-errors
# (what numba compiles is a language of its own, which type checkers cannot read)
"""The vector instructions of attention for a few rows, as functions that numba can call (see `vector_ops`).

Invariant: addresses and strides are numbers of bytes; a function touches the row and keys it names, no more.

Lanes are keys here. Where they are rows, one sequence's three query heads of a KV head would use 3 of 16.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from stemcache.kernels.vector_ops import F32, FLOATS, I32, I64, LANES, PAIRS, procedure


def _halves(groups):
    """Lanes of two vectors in groups of `groups`: the first halves of all, and the second halves."""
    half = groups // 2
    begins = range(0, 2 * LANES, groups)
    return [
        ir.Constant(PAIRS, [begin + offset + lane for begin in begins for lane in range(half)]) for offset in (0, half)
    ]


def _sums(e, vectors):
    """The sum of each of 16 vectors' lanes, one a lane: vectors are added by halves and put together, two in one."""
    groups = LANES
    while len(vectors) > 1:
        low, high = _halves(groups)
        vectors = [
            e.fadd(e.builder.shuffle_vector(a, b, low), e.builder.shuffle_vector(a, b, high))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        groups //= 2
    return vectors[0]


def _over_lanes(e, combine, vector):
    """A vector with what all lanes come to in each."""
    distance = LANES
    while distance > 1:
        distance //= 2
        turned = ir.Constant(PAIRS, [lane ^ distance for lane in range(LANES)])
        vector = combine(vector, e.builder.shuffle_vector(vector, vector, turned))
    return vector


@intrinsic
def scores_of_row(context, query, keys, keys_stride, vectors, scores, ahead):
    """scores[key] = query . keys[key], for 16 keys of 16 * vectors pairs. As many keys at another address are fetched
    meanwhile."""

    def emit(e, query, keys, keys_stride, vectors, scores, ahead):
        totals = [e.variable(e.constant(0.0)) for _ in range(LANES)]
        with cgutils.for_range(e.builder, vectors) as loop:
            at = e.mul(loop.index, I64(4 * LANES))
            own = e.load(e.add(query, at), PAIRS)
            for key, total in enumerate(totals):
                e.add_products(total, own, e.load(e.add(e.at(keys, key, keys_stride), at), PAIRS))
                e.prefetch(e.add(e.at(ahead, key, keys_stride), at))
        e.store(_sums(e, [e.builder.load(total) for total in totals]), scores)

    return procedure(emit, query, keys, keys_stride, vectors, scores, ahead)


@intrinsic
def softmax_of_row(context, scores, vectors, weights, maximum, sum_, factor, scale):
    """One step of the online softmax in base 2 (arXiv 1805.02867), for one row and 16 * vectors keys.

    scores: float32, times `scale` (log2(e) included). weights: becomes the keys' weights, bfloat16.
    maximum, sum_: float32, brought up to date; factor: becomes what earlier outputs are multiplied by.
    """

    def emit(e, scores, vectors, weights, maximum, sum_, factor, scale):
        scale, before = e.splat(scale), e.splat(e.load(maximum, F32))
        largest = e.variable(e.constant(-3e38))
        with cgutils.for_range(e.builder, vectors) as loop:
            found = e.load(e.add(scores, e.mul(loop.index, I64(4 * LANES))), FLOATS)
            e.builder.store(e.larger(found, e.builder.load(largest)), largest)
        highest = e.larger(e.fmul(_over_lanes(e, e.larger, e.builder.load(largest)), scale), before)
        shrunk, negative = e.exp2(e.fsub(before, highest)), e.fneg(highest)
        total = e.variable(e.constant(0.0))
        with cgutils.for_range(e.builder, vectors) as loop:
            found = e.load(e.add(scores, e.mul(loop.index, I64(4 * LANES))), FLOATS)
            weight = e.exp2(e.multiply_add(found, scale, negative))
            e.builder.store(e.fadd(e.builder.load(total), weight), total)
            e.store_rounded(weight, e.add(weights, e.mul(loop.index, I64(2 * LANES))))
        added = _over_lanes(e, e.fadd, e.builder.load(total))
        first = I32(0)
        for value, address in (
            (highest, maximum),
            (shrunk, factor),
            (e.multiply_add(e.splat(e.load(sum_, F32)), shrunk, added), sum_),
        ):
            e.store(e.builder.extract_element(value, first), address)

    return procedure(emit, scores, vectors, weights, maximum, sum_, factor, scale)
