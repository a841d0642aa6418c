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


def _widened(e, halves):
    """16 bfloat16 numbers, given as their bits, as floats."""
    wide = e.builder.zext(halves, PAIRS)
    return e.bitcast(e.builder.shl(wide, ir.Constant(PAIRS, [16] * LANES)), FLOATS)


def _load(e, address, block):
    return _widened(e, e.load(e.add(address, e.mul(block, I64(_BYTES))), HALVES))


def _rounded(e, value):
    """Floats as near as bfloat16 has them."""
    return _widened(e, e.bitcast(e.as_bfloats(value), HALVES))


def _normalise(is_above_one):
    @intrinsic
    def function(context, row, weight, out, blocks, epsilon):
        """out = weight * (row / sqrt(mean(row ** 2) + epsilon)), the quotient rounded first; or, with weights that are
        given as what they are above one, rounded once. out may be the row."""

        def emit(e, row, weight, out, blocks, epsilon):
            squares = e.variable(e.constant(0.0))
            with cgutils.for_range(e.builder, blocks) as loop:
                x = _load(e, row, loop.index)
                e.builder.store(e.multiply_add(x, x, e.builder.load(squares)), squares)
            count = e.builder.uitofp(e.mul(blocks, I64(LANES)), F32)
            mean = e.builder.fdiv(e.sum_of_lanes(e.builder.load(squares)), count)
            root = e.call("llvm.sqrt.f32", F32, e.fadd(mean, epsilon))
            factor = e.splat(e.builder.fdiv(ir.Constant(F32, 1.0), root))
            with cgutils.for_range(e.builder, blocks) as loop:
                x, by = e.fmul(_load(e, row, loop.index), factor), _load(e, weight, loop.index)
                product = e.fmul(x, e.fadd(by, e.constant(1.0))) if is_above_one else e.fmul(_rounded(e, x), by)
                e.store_rounded(product, e.add(out, e.mul(loop.index, I64(_BYTES))))

        return procedure(emit, row, weight, out, blocks, epsilon)

    return function


normalise, normalise_above_one = _normalise(False), _normalise(True)


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


def _gate(argument):
    @intrinsic
    def function(context, gates, values, out, blocks):
        """out = x * sigmoid(argument(x)) * values for x in gates, what comes before the values rounded first."""

        def emit(e, gates, values, out, blocks):
            one, zero, to_base_2 = e.constant(1.0), e.constant(0.0), e.constant(-math.log2(math.e))
            with cgutils.for_range(e.builder, blocks) as loop:
                x = _load(e, gates, loop.index)
                at = argument(e, x)
                power = e.exp2(e.fmul(e.call("llvm.fabs.v16f32", FLOATS, at), to_base_2))  # exp(-|at|)
                above = e.builder.select(e.builder.fcmp_unordered(">=", at, zero), one, power)
                active = e.fmul(x, e.builder.fdiv(above, e.fadd(one, power)))
                product = e.fmul(_rounded(e, active), _load(e, values, loop.index))
                e.store_rounded(product, e.add(out, e.mul(loop.index, I64(_BYTES))))

        return procedure(emit, gates, values, out, blocks)

    return function


def _gelu_argument(e, x):
    """gelu(x) = x / 2 * (1 + tanh(y)) = x * sigmoid(2 * y) with y = sqrt(2 / pi) * (x + 0.044715 * x ** 3) (arXiv
    1606.08415)."""
    scale = 2 * math.sqrt(2 / math.pi)
    inner = e.multiply_add(e.fmul(x, x), e.constant(0.044715 * scale), e.constant(scale))
    return e.fmul(x, inner)


gate_by_silu, gate_by_gelu = _gate(lambda e, x: x), _gate(_gelu_argument)


@intrinsic
def add(context, rows, to, blocks):
    """to += rows."""

    def emit(e, rows, to, blocks):
        with cgutils.for_range(e.builder, blocks) as loop:
            total = e.fadd(_load(e, rows, loop.index), _load(e, to, loop.index))
            e.store_rounded(total, e.add(to, e.mul(loop.index, I64(_BYTES))))

    return procedure(emit, rows, to, blocks)
