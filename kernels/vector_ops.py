# mypy: ignore-errors
# (what numba compiles is a language of its own, which type checkers cannot read)
"""The vector instructions of the fused CPU kernel, as functions that numba can call.

Invariant: addresses and strides are numbers of bytes; a function touches the rows, keys and columns it names, no more.

numba has no vector types, and LLVM finds no products of bfloat16 pairs by itself, so these bodies are given as LLVM
instructions. A vector has 16 lanes of 32 bits: a float32, or a pair of bfloat16 numbers, whose products with another
pair's are added to a float32 (VDPBF16PS, of AVX512_BF16). Import it only where that instruction set is.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
KEYS_AT_ONCE = 8
"""Keys of a block of scores: with 3 vectors of rows these are 24 sums, which 32 registers hold beside their factors.
(A sum waits some 6 cycles for its last product on a Zen 4, so with one vector of rows 8 are just enough.)"""
ROWS_AT_ONCE = 4
"""Rows of a block of outputs: with 4 vectors of the head these are 16 sums."""
NO_SCORE = -1e30
"""The maximum of no scores: below any score, yet finite, so that a difference of two is a number."""

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


FLOATS, PAIRS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
HALVES, _BOTH_HALVES, _BFLOATS = (ir.VectorType(*of) for of in ((I16, LANES), (I16, 2 * LANES), (_BFloat(), 2 * LANES)))
_HALF_BFLOATS = ir.VectorType(_BFloat(), LANES)
_INTERLEAVED = ir.Constant(ir.VectorType(I32, 2 * LANES), [lane + half for lane in range(LANES) for half in (0, LANES)])


class Emitter:
    """Appends instructions to the function that numba is building."""

    def __init__(self, builder):
        self.builder = builder
        for name in ("add", "mul", "fadd", "fsub", "fmul", "fneg", "bitcast"):
            setattr(self, name, getattr(builder, name))

    def load(self, address, kind):
        found = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        found.align = 4
        return found

    def store(self, value, address):
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer())).align = 4

    def at(self, address, index, stride):
        """address + index * stride; the index is a Python number."""
        return self.add(address, self.mul(I64(index), stride if isinstance(stride, ir.Value) else I64(stride)))

    def constant(self, number):
        return ir.Constant(FLOATS, [number] * LANES)

    def splat(self, number):
        undefined = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
        first = self.builder.insert_element(undefined, number, I32(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(PAIRS, [0] * LANES))

    def interleaved(self, first, second):
        """16-bit lanes of two vectors in turn: the pairs (first[i], second[i])."""
        return self.builder.shuffle_vector(first, second, _INTERLEAVED)

    def variable(self, value):
        """A value that changes in a loop: LLVM keeps it in a register."""
        kept = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, kept)
        return kept

    def call(self, name, kind, *values):
        declared = ir.FunctionType(kind, [value.type for value in values])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, declared, name), list(values))

    def larger(self, first, second):
        """The larger one of each lane, and the first where it is NaN, so that a broken model's answers look broken."""
        return self.builder.select(self.builder.fcmp_unordered(">=", first, second), first, second)

    def multiply_add(self, a, b, c):
        return self.call("llvm.fma.v16f32", FLOATS, a, b, c)

    def add_products(self, total, pairs, others):
        pairs, others = self.bitcast(pairs, _BFLOATS), self.bitcast(others, _BFLOATS)
        self.builder.store(
            self.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, self.builder.load(total), pairs, others), total
        )

    def prefetch(self, address):
        """Have 64 bytes on their way into the core's second cache."""
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        self.builder.call(function, [self.builder.inttoptr(address, cgutils.voidptr_t), I32(0), I32(2), I32(1)])

    def multiply(self, totals, pairs, singles, step, singles_stride, vectors, stride, ahead=()):
        """totals[i][v] += sum over pairs of singles[pair, i] . vectors[pair, v]: pairs of the one lie `step` apart and
        its i `singles_stride`, pairs of the other `stride` and its v a vector. ahead: addresses of memory that is
        fetched meanwhile, with its bytes a pair."""
        with cgutils.for_range(self.builder, pairs) as loop:
            row = self.add(vectors, self.mul(loop.index, stride))
            own = [self.load(self.at(row, v, 4 * LANES), PAIRS) for v in range(len(totals[0]))]
            for address, each in ahead:
                self.prefetch(self.add(address, self.mul(loop.index, each)))
            column = self.add(singles, self.mul(loop.index, step))
            for i, of_single in enumerate(totals):
                pair = self.splat(self.load(self.at(column, i, singles_stride), I32))
                for total, vector in zip(of_single, own, strict=True):
                    self.add_products(total, vector, pair)

    def as_bfloats(self, value):
        """16 floats as the nearest bfloat16 numbers, ties to even."""
        return self.call("llvm.x86.avx512bf16.cvtneps2bf16.512", _HALF_BFLOATS, value)

    def store_rounded(self, value, address):
        self.store(self.as_bfloats(value), address)

    def sum_of_lanes(self, lanes):
        """Halves added to halves."""
        count = LANES
        while count > 1:
            count //= 2
            kind = ir.VectorType(I32, count)
            low, high = ir.Constant(kind, list(range(count))), ir.Constant(kind, list(range(count, 2 * count)))
            lanes = self.fadd(
                self.builder.shuffle_vector(lanes, lanes, low), self.builder.shuffle_vector(lanes, lanes, high)
            )
        return self.builder.extract_element(lanes, I32(0))

    def exp2(self, x):
        """2 ** x for x <= 0, to 3e-6 (the Taylor polynomial of degree 5 on [-1/2, 1/2]); 0 below -200."""
        x = self.larger(x, self.constant(-200.0))
        whole = self.call("llvm.rint.v16f32", FLOATS, x)
        part = self.fsub(x, whole)
        value = self.constant(math.log(2) ** 5 / math.factorial(5))
        for power in (4, 3, 2, 1, 0):
            value = self.multiply_add(value, part, self.constant(math.log(2) ** power / math.factorial(power)))
        every, nearest = ir.Constant(I16, -1), I32(4)
        return self.call("llvm.x86.avx512.mask.scalef.ps.512", FLOATS, value, whole, value, every, nearest)


def procedure(emit, *given):
    """What an intrinsic returns to numba: the signature for the given argument types, and how to emit the body."""

    def code(context, builder, signature, values):
        emit(Emitter(builder), *values)
        return context.get_dummy_value()

    return types.void(*given), code


@intrinsic
def memory(context, address):
    """The memory at an address, for `numba.carray`."""
    return types.voidptr(address), lambda _, builder, __, given: builder.inttoptr(given[0], cgutils.voidptr_t)


@intrinsic
def take_number(context, counter):
    """The int64 at an address, which becomes one more: no two threads get the same."""

    def code(_, builder, __, given):
        return builder.atomic_rmw("add", builder.inttoptr(given[0], I64.as_pointer()), I64(1), "monotonic")

    return types.int64(counter), code


def _scores(vectors):
    @intrinsic
    def function(context, queries, queries_stride, keys, keys_stride, pairs, scores, scores_stride, ahead):
        """scores[key, row] = sum over pairs of keys[key, pair] . queries[pair, row], for KEYS_AT_ONCE keys and
        16 * vectors rows. As many keys at another address are fetched meanwhile."""

        def emit(e, queries, queries_stride, keys, keys_stride, pairs, scores, scores_stride, ahead):
            fetched = [(ahead, I64(4 * KEYS_AT_ONCE))]
            totals = [[e.variable(e.constant(0.0)) for _ in range(vectors)] for _ in range(KEYS_AT_ONCE)]
            e.multiply(totals, pairs, keys, I64(4), keys_stride, queries, queries_stride, fetched)
            for i, of_key in enumerate(totals):
                for v, total in enumerate(of_key):
                    e.store(e.builder.load(total), e.at(e.at(scores, i, scores_stride), v, 4 * LANES))

        given = queries, queries_stride, keys, keys_stride, pairs, scores, scores_stride, ahead
        return procedure(emit, *given)

    return function


def _outputs(vectors):
    @intrinsic
    def function(context, weights, step, row_stride, values, values_stride, pairs, outputs, outputs_stride, factors):
        """outputs[row, d] = outputs[row, d] * factors[row] + sum over pairs of weights[pair, row] . values[pair, d],
        for ROWS_AT_ONCE rows and 16 * vectors columns d. Weights of a row's pairs lie `step` apart."""

        def emit(e, weights, step, row_stride, values, values_stride, pairs, outputs, outputs_stride, factors):
            places = [
                [e.at(e.at(outputs, i, outputs_stride), v, 4 * LANES) for v in range(vectors)]
                for i in range(ROWS_AT_ONCE)
            ]
            totals = []
            for i, of_row in enumerate(places):
                factor = e.splat(e.load(e.at(factors, i, 4), F32))
                totals.append([e.variable(e.fmul(e.load(place, FLOATS), factor)) for place in of_row])
            e.multiply(totals, pairs, weights, step, row_stride, values, values_stride)
            for of_place, of_row in zip(places, totals, strict=True):
                for place, total in zip(of_place, of_row, strict=True):
                    e.store(e.builder.load(total), place)

        given = weights, step, row_stride, values, values_stride, pairs, outputs, outputs_stride, factors
        return procedure(emit, *given)

    return function


scores_of_16, scores_of_32, scores_of_48 = (_scores(vectors) for vectors in (1, 2, 3))
outputs_of_16, outputs_of_32, outputs_of_64 = (_outputs(vectors) for vectors in (1, 2, 4))


@intrinsic
def softmax(context, scores, stride, weights, pairs, maxima, sums, factors, scale):
    """One step of the online softmax in base 2 (arXiv 1805.02867), for 16 rows and 2 * pairs keys.

    scores: float32[2 * pairs, 16] with a stride of `stride`, times `scale` (log2(e) included).
    weights: becomes the keys' weights as pairs, [pairs, 16] with the same stride.
    maxima, sums: float32[16], brought up to date; factors: becomes what earlier outputs are multiplied by.
    """

    def emit(e, scores, stride, weights, pairs, maxima, sums, factors, scale):
        scale, two = e.splat(scale), e.mul(stride, I64(2))
        largest, before = e.variable(e.constant(-3e38)), e.load(maxima, FLOATS)
        with cgutils.for_range(e.builder, pairs) as loop:
            at = e.add(scores, e.mul(loop.index, two))
            pair = e.larger(e.load(at, FLOATS), e.load(e.add(at, stride), FLOATS))
            e.builder.store(e.larger(pair, e.builder.load(largest)), largest)
        maximum = e.larger(e.fmul(e.builder.load(largest), scale), before)
        factor = e.exp2(e.fsub(before, maximum))
        total = e.variable(e.fmul(e.load(sums, FLOATS), factor))
        e.store(maximum, maxima)
        e.store(factor, factors)
        negative = e.fneg(maximum)
        with cgutils.for_range(e.builder, pairs) as loop:
            at = e.add(scores, e.mul(loop.index, two))
            first, second = (
                e.exp2(e.multiply_add(e.load(place, FLOATS), scale, negative)) for place in (at, e.add(at, stride))
            )
            e.builder.store(e.fadd(e.builder.load(total), e.fadd(first, second)), total)
            rounded = e.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", _BFLOATS, second, first)
            halves = e.bitcast(rounded, _BOTH_HALVES)
            paired = e.builder.shuffle_vector(halves, ir.Constant(_BOTH_HALVES, ir.Undefined), _INTERLEAVED)
            e.store(e.bitcast(paired, PAIRS), e.add(weights, e.mul(loop.index, stride)))
        e.store(e.builder.load(total), sums)

    return procedure(emit, scores, stride, weights, pairs, maxima, sums, factors, scale)


@intrinsic
def pair_values(context, values, stride, pairs, paired, blocks, ahead):
    """paired[pair, d] = (values[2 * pair, d], values[2 * pair + 1, d]) for 16 * blocks columns d of bfloat16 values.
    As many values at another address are fetched meanwhile."""

    def emit(e, values, stride, pairs, paired, blocks, ahead):
        with cgutils.for_range(e.builder, pairs) as outer:
            row = e.add(values, e.mul(outer.index, e.mul(stride, I64(2))))
            out = e.add(paired, e.mul(outer.index, e.mul(blocks, I64(4 * LANES))))
            coming = e.add(ahead, e.mul(outer.index, e.mul(stride, I64(2))))
            with cgutils.for_range(e.builder, blocks) as inner:
                at = e.add(row, e.mul(inner.index, I64(2 * LANES)))
                both = e.interleaved(e.load(at, HALVES), e.load(e.add(at, stride), HALVES))
                e.store(both, e.add(out, e.mul(inner.index, I64(4 * LANES))))
                e.prefetch(e.add(coming, e.mul(inner.index, I64(4 * LANES))))

    return procedure(emit, values, stride, pairs, paired, blocks, ahead)


@intrinsic
def store_rounded(context, values, factor, out, blocks):
    """out[d] = values[d] * factor, rounded to bfloat16, for 16 * blocks columns d."""

    def emit(e, values, factor, out, blocks):
        factor = e.splat(factor)
        with cgutils.for_range(e.builder, blocks) as loop:
            scaled = e.fmul(e.load(e.add(values, e.mul(loop.index, I64(4 * LANES))), FLOATS), factor)
            e.store_rounded(scaled, e.add(out, e.mul(loop.index, I64(2 * LANES))))

    return procedure(emit, values, factor, out, blocks)
