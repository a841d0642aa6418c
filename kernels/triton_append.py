# mypy: ignore-errors
# (a kernel's body is Triton's language, which type checkers cannot read)
"""The append kernel: a step's keys and values into their slots of one pool layer, both in one launch.

Invariant: exactly the slots of the step's metadata are written, and a token's codes are those of `quantised.quantise`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def append_kernel(
    key,  # [T, KV_HEADS, D], any strides of the first two
    value,
    pool,
    scales,
    step,
    n_chunks,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BITS: tl.constexpr,
):
    """Program (block of rows, KV head, 0 for keys or 1 for values)."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    side = tl.program_id(2)
    known = rows < tl.load(step)
    slot = tl.load(step + tl.load(step + 7) + rows, mask=known, other=0).to(tl.int64)
    token = (side * KV_HEADS + head) * n_chunks.to(tl.int64) * CHUNK + slot
    if side == 0:
        source = key + rows.to(tl.int64) * key_row_stride + head * key_head_stride
    else:
        source = value + rows.to(tl.int64) * value_row_stride + head * value_head_stride
    D_PAD: tl.constexpr = triton.next_power_of_2(D)
    offs_d = tl.arange(0, D_PAD)
    if BITS == 16:
        mask = known[:, None] & (offs_d < D)[None, :]
        values = tl.load(source[:, None] + offs_d[None, :], mask=mask)
        tl.store(pool + token[:, None] * D + offs_d[None, :], values, mask=mask)
    elif BITS == 8:
        mask = known[:, None] & (offs_d < D)[None, :]
        values = tl.load(source[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = tl.max(tl.abs(values), 1) / 127
        codes = _round(values / tl.where(scale == 0, 1.0, scale)[:, None])
        tl.store(pool + token[:, None] * D + offs_d[None, :], codes.to(tl.int8), mask=mask)
        tl.store(scales + token * 2, scale, mask=known)
        tl.store(scales + token * 2 + 1, scale * 0, mask=known)
    else:
        pair = tl.arange(0, D_PAD // 2)
        mask = known[:, None] & (pair < D // 2)[None, :]
        at = source[:, None] + 2 * pair[None, :]
        even = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        odd = tl.load(at + 1, mask=mask, other=0.0).to(tl.float32)
        low = tl.minimum(even, odd)
        high = tl.maximum(even, odd)
        inner = (pair < D // 2)[None, :]  # of rows beyond the step, zeros, which nobody stores
        zero = tl.min(tl.where(inner, low, float("inf")), 1)
        scale = (tl.max(tl.where(inner, high, float("-inf")), 1) - zero) / 15
        divisor = tl.where(scale == 0, 1.0, scale)[:, None]
        codes = _nibble(even, zero, divisor) | (_nibble(odd, zero, divisor) << 4)
        tl.store(pool + token[:, None] * (D // 2) + pair[None, :], codes.to(tl.uint8), mask=mask)
        tl.store(scales + token * 2, scale, mask=known)
        tl.store(scales + token * 2 + 1, zero, mask=known)


@triton.jit
def _nibble(values, zero, divisor):
    return tl.minimum(tl.maximum(_round((values - zero[:, None]) / divisor), 0.0), 15.0).to(tl.int32)


@triton.jit
def _round(values):
    """To the nearest integer, halves to the even one: adding 1.5 * 2^23 leaves float32 no room for a fraction."""
    return (values + 12582912.0) - 12582912.0
