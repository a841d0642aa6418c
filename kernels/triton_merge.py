# mypy: ignore-errors
# (a kernel's body is Triton's language, which type checkers cannot read)
"""The merge kernel: each row's partial results, weighted by their log-sum-exps, into its output.

Invariant: rows whose only piece wrote the output itself are left alone. The formula is that of `kernels.merge`, in
base 2; the partials are added in the order of their positions, so equal partials give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    part_out,  # float32[parts, q_heads, D]
    part_lse,  # float32[parts, q_heads], base 2
    out,  # [T, q_heads, D]
    step,
    sinks,
    Q_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Program (row, block of query heads); more rows than the step has are no harm."""
    row = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_p = tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, triton.next_power_of_2(D))
    real = head < Q_HEADS
    known = row < tl.load(step)
    begins = step + tl.load(step + 8)
    begin = tl.load(begins + row, mask=known, other=0)
    end = tl.load(begins + row + 1, mask=known, other=0)
    parts = step + tl.load(step + 9)
    if HAS_SINKS:
        top = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.full([BLOCK_H], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, triton.next_power_of_2(D)], tl.float32)
    for first in range(begin, end, BLOCK_P):
        used = first + offs_p < end
        index = tl.load(parts + first + offs_p, mask=used, other=0).to(tl.int64)[:, None] * Q_HEADS + head[None, :]
        some = used[:, None] & real[None, :]
        lse = tl.load(part_lse + index, mask=some, other=float("-inf"))
        mask = some[:, :, None] & (offs_d < D)[None, None, :]
        values = tl.load(part_out + index[:, :, None] * D + offs_d[None, None, :], mask=mask, other=0.0)
        peak = tl.maximum(top, tl.max(lse, 0))
        finite = tl.where(peak == float("-inf"), 0.0, peak)  # outside its window a row may see nothing of many pieces
        weights = tl.exp2(lse - finite[None, :])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
        top = peak
    at = (row.to(tl.int64) * Q_HEADS + head)[:, None] * D + offs_d[None, :]
    mask = real[:, None] & (offs_d < D)[None, :] & (begin < end)
    tl.store(out + at, (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty), mask=mask)
