# mypy: ignore-errors
# (a kernel's body is Triton's language, which type checkers cannot read)
"""The attention kernel: pieces of the step's metadata, decode and prefill, shared and private, in one launch.

Invariant: a key that a row may not see never reaches its result, whatever the pool holds there; a row that sees
nothing of a piece writes zeros with log-sum-exp -inf. Softmax in base 2 and float32, the scale folded into it.

A program takes every `num_programs`-th (piece, KV head, block of its query heads): first those of the large tile, then
the small. Query heads are packed with the rows into the tile, so a key is read once for the whole group.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_kernel(
    query,  # [T, q_heads, D], any strides of the first two
    pool,  # [2, KV_HEADS, n_chunks, CHUNK, D], or codes
    scales,  # float32[2, KV_HEADS, n_chunks, CHUNK, 2] of a quantised pool
    out,  # [T, q_heads, D]
    part_out,  # float32[parts, q_heads, D]
    part_lse,  # float32[parts, q_heads], base 2
    step,  # int32, see triton_metadata
    sinks,  # [q_heads]
    n_chunks,
    row_stride,
    head_stride,
    scale,  # times log2(e), unless there is a softcap
    softcap,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LARGE_M: tl.constexpr,
    SMALL_M: tl.constexpr,
    HAS_LARGE: tl.constexpr,
    HAS_SMALL: tl.constexpr,
    BITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WIDE_DOT: tl.constexpr,
):
    blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    per_piece: tl.constexpr = KV_HEADS * blocks
    n_large = tl.load(step + 1)
    n_small = tl.load(step + 2)
    pieces = step + tl.load(step + 3)
    if HAS_LARGE:
        for w in range(tl.program_id(0), n_large * per_piece, tl.num_programs(0)):
            _piece(
                query, pool, scales, out, part_out, part_lse, step, sinks, n_chunks, row_stride, head_stride,
                scale, softcap, window, pieces + w // per_piece * 6, w % per_piece // blocks, w % blocks,
                KV_HEADS, GROUP, HEADS, D, CHUNK, BLOCK_N, LARGE_M, BITS, HAS_SOFTCAP, HAS_WINDOW, HAS_SINKS, WIDE_DOT,
            )  # fmt: skip
    if HAS_SMALL:
        pieces += n_large * 6
        for w in range(tl.program_id(0), n_small * per_piece, tl.num_programs(0)):
            _piece(
                query, pool, scales, out, part_out, part_lse, step, sinks, n_chunks, row_stride, head_stride,
                scale, softcap, window, pieces + w // per_piece * 6, w % per_piece // blocks, w % blocks,
                KV_HEADS, GROUP, HEADS, D, CHUNK, BLOCK_N, SMALL_M, BITS, HAS_SOFTCAP, HAS_WINDOW, HAS_SINKS, WIDE_DOT,
            )  # fmt: skip


@triton.jit
def _piece(
    query, pool, scales, out, part_out, part_lse, step, sinks, n_chunks, row_stride, head_stride,
    scale, softcap, window, piece, kv_head, block,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr, WIDE_DOT: tl.constexpr,
):  # fmt: skip
    D_PAD: tl.constexpr = max(16, triton.next_power_of_2(D))
    Q_HEADS: tl.constexpr = KV_HEADS * GROUP
    first_row = tl.load(piece)
    n_rows = tl.load(piece + 1)
    n_keys = tl.load(piece + 3)
    kv_start = tl.load(piece + 4)
    part = tl.load(piece + 5)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D_PAD)
    entry = offs_m // HEADS
    group_head = block * HEADS + offs_m % HEADS
    valid = (entry < n_rows) & (group_head < GROUP)
    head = kv_head * GROUP + group_head
    row = tl.load(step + tl.load(step + 4) + first_row + entry, mask=valid, other=0).to(tl.int64)
    position = tl.load(step + tl.load(step + 5) + first_row + entry, mask=valid, other=0) - kv_start
    limit = tl.where(valid, tl.minimum(position + 1, n_keys), 0)
    q_mask = valid[:, None] & (offs_d < D)[None, :]
    q = tl.load(
        query + row[:, None] * row_stride + head[:, None] * head_stride + offs_d[None, :], mask=q_mask, other=0.0
    )
    first_tile = 0
    if HAS_WINDOW:
        # tiles before the first row's window; adding whole hidden tiles would change nothing but time
        first_tile = tl.maximum(tl.min(tl.where(valid, position, 2147483647)) - window + 1, 0) // BLOCK_N
    acc, top, total = _keys(
        q, pool, scales, step + tl.load(step + 6) + tl.load(piece + 2), n_chunks, kv_head, first_tile, n_keys, limit,
        position, scale, softcap, window, KV_HEADS, D, D_PAD, CHUNK, BLOCK_N, BLOCK_M, BITS, HAS_SOFTCAP, HAS_WINDOW,
        WIDE_DOT,
    )  # fmt: skip
    if part < 0:
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
            peak = tl.maximum(top, sink)
            shrink = tl.exp2(top - peak)
            acc *= shrink[:, None]
            total = total * shrink + tl.exp2(sink - peak)
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        at = (row * Q_HEADS + head)[:, None] * D + offs_d[None, :]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=q_mask)
    else:
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        index = (part + entry).to(tl.int64) * Q_HEADS + head
        tl.store(part_out + index[:, None] * D + offs_d[None, :], result, mask=q_mask)
        lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(part_lse + index, lse, mask=valid)


@triton.jit
def _keys(
    q, pool, scales, chunks, n_chunks, kv_head, first_tile, n_keys, limit, position, scale, softcap, window,
    KV_HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, WIDE_DOT: tl.constexpr,
):  # fmt: skip
    """Online softmax over the piece's keys: (sum of weighted values, greatest score, sum of weights) of each tile
    row."""
    TILES: tl.constexpr = CHUNK // BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    side = n_chunks.to(tl.int64) * KV_HEADS * CHUNK  # tokens of all keys
    base = kv_head * n_chunks.to(tl.int64) * CHUNK
    q_sum = tl.sum(q.to(tl.float32), 1)
    # The next id is loaded one round ahead: with the load in the loop the compiler keeps a single buffer of keys.
    following = tl.load(chunks + first_tile // TILES)
    for tile in range(first_tile, tl.cdiv(n_keys, BLOCK_N)):
        chunk = following.to(tl.int64)
        following = tl.load(chunks + (tile + 1) // TILES)
        key_index = tile * BLOCK_N + offs_n
        token = base + chunk * CHUNK + tile % TILES * BLOCK_N + offs_n
        inside = key_index < n_keys
        k = _values(pool, token, inside, q.dtype, D, D_PAD, BITS)
        if WIDE_DOT:
            scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if BITS < 16:
            scores *= tl.load(scales + token * 2, mask=inside, other=0.0)[None, :]
        if BITS == 4:
            scores += q_sum[:, None] * tl.load(scales + token * 2 + 1, mask=inside, other=0.0)[None, :]
        scores *= scale
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1); both ends go to +-1
            scores = 1.4426950408889634 * softcap * (1 - 2 / (tl.exp2(2.8853900817779268 * scores) + 1))
        visible = key_index[None, :] < limit[:, None]
        if HAS_WINDOW:
            visible &= key_index[None, :] > position[:, None] - window
        scores = tl.where(visible, scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen nothing yet
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(weights, 1)
        top = peak
        # masked: a weight of zero times NaN in an unwritten slot would be NaN
        v = _values(pool, side + token, inside, q.dtype, D, D_PAD, BITS)
        if BITS == 4:
            zero = tl.load(scales + (side + token) * 2 + 1, mask=inside, other=0.0)
            acc = acc * shrink[:, None] + tl.sum(weights * zero[None, :], 1)[:, None]
            shrink = tl.full([BLOCK_M], 1.0, tl.float32)
        if BITS < 16:
            weights *= tl.load(scales + (side + token) * 2, mask=inside, other=0.0)[None, :]
        if WIDE_DOT:
            acc = acc * shrink[:, None] + tl.dot(weights, v.to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit
def _values(pool, token, inside, dtype: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BITS: tl.constexpr):
    """[BLOCK_N, D_PAD] of the tokens; zeros outside. Codes of a quantised pool, still to be scaled by the token."""
    if BITS == 4:
        pair = tl.arange(0, D_PAD // 2)
        mask = inside[:, None] & (pair < D // 2)[None, :]
        codes = tl.load(pool + token[:, None] * (D // 2) + pair[None, :], mask=mask, other=0)
        return tl.interleave((codes & 15).to(dtype), (codes >> 4).to(dtype))
    offs_d = tl.arange(0, D_PAD)
    mask = inside[:, None] & (offs_d < D)[None, :]
    return tl.load(pool + token[:, None] * D + offs_d[None, :], mask=mask, other=0).to(dtype)
