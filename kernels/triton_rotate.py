# mypy: ignore-errors
# (a kernel's body is Triton's language, which type checkers cannot read)
"""The rotation kernel: tokens moved to other slots and positions, in all layers at once.

Invariant: as in `kernels.rotation`, whose function it is: keys are rotated in float32 and rounded once, values copied.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_kernel(
    pool,  # [layers, 2, kv_heads, n_slots, D]
    source,  # int32[n]
    target,  # int32[n]
    turn,  # int32[n], row of the tables
    cos,  # float32[turns, ROTARY / 2]
    sin,
    n_tokens,
    n_slots,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program (block of tokens, KV head, layer). Dims j and j + ROTARY / 2 turn together; those from ROTARY on stay."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    known = tokens < n_tokens
    keys = (layer * 2 * KV_HEADS + head) * n_slots.to(tl.int64)
    values = keys + KV_HEADS * n_slots.to(tl.int64)
    old = tl.load(source + tokens, mask=known, other=0).to(tl.int64)[:, None] * D
    new = tl.load(target + tokens, mask=known, other=0).to(tl.int64)[:, None] * D
    HALF: tl.constexpr = ROTARY // 2
    half = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    mask = known[:, None] & (half < HALF)
    angle = tl.load(turn + tokens, mask=known, other=0)[:, None] * HALF + half
    c = tl.load(cos + angle, mask=mask, other=0.0)
    s = tl.load(sin + angle, mask=mask, other=0.0)
    first = tl.load(pool + keys * D + old + half, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pool + keys * D + old + HALF + half, mask=mask, other=0.0).to(tl.float32)
    offs_d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    whole = known[:, None] & (offs_d < D)
    value = tl.load(pool + values * D + old + offs_d, mask=whole, other=0.0)
    rest = known[:, None] & (offs_d >= ROTARY) & (offs_d < D)
    unturned = tl.load(pool + keys * D + old + offs_d, mask=rest, other=0.0)
    dtype = pool.dtype.element_ty
    tl.store(pool + keys * D + new + half, (first * c - second * s).to(dtype), mask=mask)
    tl.store(pool + keys * D + new + HALF + half, (second * c + first * s).to(dtype), mask=mask)
    tl.store(pool + keys * D + new + offs_d, unturned, mask=rest)
    tl.store(pool + values * D + new + offs_d, value, mask=whole)
