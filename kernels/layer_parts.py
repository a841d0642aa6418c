"""What a decoder layer does between its products, in bfloat16 on a CPU: norm, rotation and append, gate, sum; compiled.

Invariant: what transformers' layers round to bfloat16 on the way is rounded here, too, so results differ from theirs
at most where a sum in another order, or an exponential, falls on the other side of a rounding.

A norm is ten of PyTorch's operations and a rotation a dozen, 20 to 45 us whatever there is to compute: a third of a
decode step of one sequence of SmolLM2-135M's shape. Here each is a stage, one pass over the rows.

Rows are contiguous and given by address, as a layer's stages work in memory that is set aside for the whole of a step.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Final

import torch
from torch import Tensor

from stemcache.kernels.plan import AttentionPlan
from stemcache.kernels.stages import Stage

LANES: Final = 16
"""Widths, and halves of heads, are multiples of it."""
_BLOCK: Final = 4 << 10
"""Numbers that a thread takes at a time: about one microsecond."""


class NormJob(ctypes.Structure):
    """rows, weight and out (bfloat16) are addresses; a row is `heads` of `width` each, and rows lie `stride` bytes
    apart, in both."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "weight", "out", "n_rows", "heads", "width")),
        *((name, ctypes.c_int64) for name in ("stride", "block", "taken")),
        ("epsilon", ctypes.c_double),
    ]


class RotationJob(ctypes.Structure):
    """rows, cos and sin (0: nothing is turned), slots (int64) and pool are addresses; `side` is from keys to values,
    `head_side` from a KV head to the next, in bytes."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "cos", "sin", "slots", "pool", "side", "head_side")),
        *((name, ctypes.c_int64) for name in ("n_rows", "q_heads", "kv_heads", "head_dim", "block", "taken")),
    ]


class GateJob(ctypes.Structure):
    """rows and out (bfloat16) are addresses. A row is `width` gates and as many values."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "out", "n_rows", "width", "block", "taken")]


class SumJob(ctypes.Structure):
    """first, second and out (bfloat16) are addresses of `count` numbers."""

    _fields_ = [(name, ctypes.c_int64) for name in ("first", "second", "out", "count", "block", "taken")]


def norm(
    rows: int, out: int, n_rows: int, weight: Tensor, epsilon: float, *, heads: int = 1, stride: int | None = None
) -> Stage:
    """weight * (row / sqrt(mean(row ** 2) + epsilon)) (arXiv 1910.07467), the quotient rounded first.

    rows, out: bfloat16 [n_rows, heads, width], which may be the same. weight: bfloat16 [width], for each head by
    itself. stride: bytes from a row to the next, where other numbers lie between them.
    """
    width = len(weight)
    size = heads * width
    job = NormJob(rows, weight.data_ptr(), out, n_rows, heads, width, stride or 2 * size, _rows(size), 0, epsilon)
    return Stage(_functions()[0], ctypes.addressof(job), (job, weight))


def rotation(
    projected: int, turn: tuple[Tensor, Tensor] | None, pool_layer: Tensor, plan: AttentionPlan, q_heads: int
) -> Stage:
    """Turn queries and keys (RoPE, arXiv 2104.09864, by halves), and write keys and values to the pool.

    projected: bfloat16 [T, q_heads + 2 * kv_heads, head_dim], queries, keys and values; the queries are overwritten.
    turn: cosines and sines, each bfloat16 [T, head_dim], contiguous; None turns nothing. Each product is rounded.
    pool_layer: bfloat16 [2, kv_heads, chunks, chunk_tokens, head_dim], contiguous.
    Raises ValueError for other cosines and sines.
    """
    _, kv_heads, _, _, head_dim = pool_layer.shape
    for part in turn or ():
        if part.shape != (plan.n_rows, head_dim) or part.dtype != torch.bfloat16 or not part.is_contiguous():
            raise ValueError(f"a head of {head_dim} is not turned by {part.dtype} {tuple(part.shape)}")
    cos, sin = (part.data_ptr() for part in turn) if turn else (0, 0)
    slots = plan.derived(("slots",), lambda: plan.token_slots.ctypes.data)
    sides = 2 * pool_layer.stride(0), 2 * pool_layer.stride(1)
    block = _rows((q_heads + 2 * kv_heads) * head_dim)
    shape = plan.n_rows, q_heads, kv_heads, head_dim
    job = RotationJob(projected, cos, sin, slots, pool_layer.data_ptr(), *sides, *shape, block, 0)
    return Stage(_functions()[1], ctypes.addressof(job), (job, turn, plan))


def gate(rows: int, out: int, n_rows: int, width: int) -> Stage:
    """silu(gates) * values (arXiv 2002.05202), silu rounded first. rows: bfloat16 [n_rows, 2, width], gates and values.
    out: [n_rows, width], elsewhere."""
    job = GateJob(rows, out, n_rows, width, _rows(width), 0)
    return Stage(_functions()[2], ctypes.addressof(job), job)


def sum_of(first: int, second: int, out: int, count: int) -> Stage:
    """first + second, of `count` bfloat16 numbers each. out may be one of the two."""
    job = SumJob(first, second, out, count, _BLOCK, 0)
    return Stage(_functions()[3], ctypes.addressof(job), job)


def _rows(width: int) -> int:
    return max(1, _BLOCK // width)


@cache
def _functions() -> list[int]:
    from stemcache.kernels.layer_kernel import compiled

    return [int(each.address) for each in compiled()]
