# mypy: ignore-errors
# (what numba compiles is a language of its own, which type checkers cannot read)
"""The vector instructions of what a layer does between its products, as functions that numba can call.

Invariant: addresses are numbers of bytes; `blocks` are 16 numbers each. Whatever transformers' layers round to bfloat16
on the way is rounded here (see `vector_ops`).
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from stemcache.kernels.vector_ops import F32, FLOATS, HALVES, I64, LANES, PAIRS, procedure

_BYTES = 2 * LANES  # of 16 bfloat16 numbers
_ONE = 1.0


def _widened(e, halves):
    """16 bfloat16 numbers, given as their bits, as floats."""
    wide = e.builder.zext(halves, PAIRS)
    return e.bitcast(e.builder.shl(wide, ir.Constant(PAIRS, [16] * LANES)), FLOATS)


def _load(e, address, block):
    return _widened(e, e.load(e.add(address, e.mul(block, I64(_BYTES))), HALVES))


def _rounded(e, value):
    """Floats as near as bfloat16 has them."""
    return _widened(e, e.bitcast(e.as_bfloats(value), HALVES))


@intrinsic
def normalise(context, row, weight, out, blocks, epsilon):
    """out = weight * (row / sqrt(mean(row ** 2) + epsilon)), the quotient rounded first. out may be the row."""

    def emit(e, row, weight, out, blocks, epsilon):
        squares = e.variable(e.constant(0.0))
        with cgutils.for_range(e.builder, blocks) as loop:
            x = _load(e, row, loop.index)
            e.builder.store(e.multiply_add(x, x, e.builder.load(squares)), squares)
        count = e.builder.uitofp(e.mul(blocks, I64(LANES)), F32)
        mean = e.builder.fdiv(e.sum_of_lanes(e.builder.load(squares)), count)
        root = e.call("llvm.sqrt.f32", F32, e.fadd(mean, epsilon))
        factor = e.splat(e.builder.fdiv(ir.Constant(F32, _ONE), root))
        with cgutils.for_range(e.builder, blocks) as loop:
            x = _rounded(e, e.fmul(_load(e, row, loop.index), factor))
            x = e.fmul(_load(e, weight, loop.index), x)
            e.store_rounded(x, e.add(out, e.mul(loop.index, I64(_BYTES))))

    return procedure(emit, row, weight, out, blocks, epsilon)


@intrinsic
def rotate(context, head, cos, sin, out, blocks):
    """out = head * cos + (-second half, first half) * sin, for halves of `blocks`. out may be the head."""

    def emit(e, head, cos, sin, out, blocks):
        half = e.mul(blocks, I64(_BYTES))
        with cgutils.for_range(e.builder, blocks) as loop:
            first, second = _load(e, head, loop.index), _load(e, e.add(head, half), loop.index)
            turned = ((out, first, e.fneg(second), I64(0)), (e.add(out, half), second, first, half))
            for target, own, other, offset in turned:
                by_cos = _rounded(e, e.fmul(own, _load(e, e.add(cos, offset), loop.index)))
                by_sin = _rounded(e, e.fmul(other, _load(e, e.add(sin, offset), loop.index)))
                e.store_rounded(e.fadd(by_cos, by_sin), e.add(target, e.mul(loop.index, I64(_BYTES))))

    return procedure(emit, head, cos, sin, out, blocks)


@intrinsic
def gate(context, gates, values, out, blocks):
    """out = silu(gates) * values, silu rounded first; silu(x) = x / (1 + exp(-x))."""

    def emit(e, gates, values, out, blocks):
        one, zero, to_base_2 = e.constant(_ONE), e.constant(0.0), e.constant(-math.log2(math.e))
        with cgutils.for_range(e.builder, blocks) as loop:
            x = _load(e, gates, loop.index)
            power = e.exp2(e.fmul(e.call("llvm.fabs.v16f32", FLOATS, x), to_base_2))  # exp(-|x|)
            above = e.builder.select(e.builder.fcmp_unordered(">=", x, zero), one, power)
            silu = e.fmul(x, e.builder.fdiv(above, e.fadd(one, power)))
            product = e.fmul(_rounded(e, silu), _load(e, values, loop.index))
            e.store_rounded(product, e.add(out, e.mul(loop.index, I64(_BYTES))))

    return procedure(emit, gates, values, out, blocks)


@intrinsic
def add(context, first, second, out, blocks):
    """out = first + second. out may be one of the two."""

    def emit(e, first, second, out, blocks):
        with cgutils.for_range(e.builder, blocks) as loop:
            total = e.fadd(_load(e, first, loop.index), _load(e, second, loop.index))
            e.store_rounded(total, e.add(out, e.mul(loop.index, I64(_BYTES))))

    return procedure(emit, first, second, out, blocks)
