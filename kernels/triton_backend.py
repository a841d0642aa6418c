"""The GPU backend: launches of the Triton kernels.

Invariant: nothing here waits for the device, copies from it, or depends on what it holds, so all of it can be
captured in a CUDA graph. Imported only when it is used: Triton is an extra.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from stemcache.kernels.plan import AttentionPlan
from stemcache.kernels.quantised import QuantisedLayer
from stemcache.kernels.triton_append import append_kernel
from stemcache.kernels.triton_attend import attend_kernel
from stemcache.kernels.triton_merge import merge_kernel
from stemcache.kernels.triton_metadata import Geometry
from stemcache.kernels.triton_rotate import rotate_kernel
from stemcache.kernels.triton_step import Step, StepKey, slots_of, step_of

LOG2E = math.log2(math.e)
INTERPRETED = isinstance(attend_kernel, InterpretedFunction)
MAX_HEAD_DIM = 256
MERGE_PARTS = 8
MERGE_HEADS = 4
APPEND_ROWS = 16
ROTATE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the attention kernel is compiled. large, small: packed rows of the tiles; keys: of a tile; stages: of the
    software pipeline, one more than the buffers of keys and values. one_launch: both tiles in one kernel, which
    takes the registers of the larger for both, or one kernel after the other."""

    large: int = 64
    small: int = 16
    keys: int = 64
    warps: int = 4
    stages: int = 3
    one_launch: bool = True


def tiles_for(head_dim: int, itemsize: int, bits: int = 16, arch: int = 90) -> Tiles:
    """The shipped configuration of a head width, element size and compute capability (90 for 9.0).

    Chosen by compiling, not by timing: no spills, and shared memory that fits (`triton_compile`). What spilled is in
    the conditions: registers limit the wide heads, quantised reads, and sm_100, whose accumulators lie elsewhere.
    """
    blackwell = 100 <= arch < 120
    little = arch in (86, 89) or arch >= 120  # 99 KiB of shared memory a block
    if itemsize == 4:
        # no matrix instructions multiply float32 exactly: the products go through registers
        return Tiles(large=16, keys=32 if head_dim <= 64 else 16, warps=4 if head_dim <= 64 else 8, stages=2)
    if bits < 16 and head_dim <= 128:
        return Tiles(keys=32) if arch >= 90 else Tiles(keys=32, warps=8, one_launch=False)
    if bits < 16:
        return Tiles(large=32, keys=16 if blackwell else 32, warps=8, one_launch=False)
    if head_dim > 128:
        if blackwell:
            return Tiles(keys=16, warps=8, stages=2, one_launch=False)
        return Tiles(keys=32, warps=8, stages=2 if little else 3)
    if head_dim > 64 and (blackwell or little):
        return Tiles(keys=32, stages=4 if blackwell else 3)
    return Tiles()


def geometry(
    q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, *, bits: int = 16
) -> Geometry:
    """How steps are cut for layers of this shape on this device."""
    tiles = tiles_for(head_dim, dtype.itemsize, bits, _arch(device))
    group = q_heads // kv_heads
    small = tiles.small if group <= tiles.small else 0
    return Geometry(kv_heads, group, tiles.large, small, _programs(device))


def step_key(
    q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, *, bits: int = 16
) -> StepKey:
    """What a `StepBuffers` for such layers is made with. bits: 8 or 4 if the pool is quantised."""
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors have it
    return StepKey(device, geometry(q_heads, kv_heads, head_dim, dtype, device, bits=bits), head_dim)


def attend(
    query: Tensor,
    pool_layer: Tensor | QuantisedLayer,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Shapes and meaning as in `kernels.attention.attend`, which checks the arguments; tiles: other than the shipped
    ones of the same sizes of rows, for measuring. Raises ValueError for head widths
    above 256 and for tensors that no GPU holds, unless Triton's interpreter runs the kernels."""
    _require(query.device, query.shape[2])
    _, q_heads, head_dim = query.shape
    _, kv_heads, n_chunks, chunk_tokens, _ = pool_layer.shape
    codes, scales, bits = _storage(pool_layer)
    key = step_key(q_heads, kv_heads, head_dim, query.dtype, query.device, bits=bits)
    step = step_of(plan, key)
    tiles = tiles or tiles_for(head_dim, query.element_size(), bits, _arch(query.device))
    query = query if query.stride(2) == 1 else query.contiguous()
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    cut = key.geometry
    programs = min(cut.programs, step.n_pieces * kv_heads * cut.head_blocks)
    launches = [(step.large, step.small)]
    if not tiles.one_launch:
        launches = [(large, not large) for large in (True, False) if (step.large if large else step.small)]
    for large, small in launches:
        attend_kernel[(programs,)](
            query,
            codes,
            scales,
            out,
            step.part_out,
            step.part_lse,
            step.words,
            query if sinks is None else sinks,
            n_chunks,
            query.stride(0),
            query.stride(1),
            scale * LOG2E if softcap is None else scale / softcap,
            softcap or 0.0,
            window or 0,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **attend_constants(
                cut,
                head_dim,
                chunk_tokens,
                tiles,
                large=large,
                small=small,
                bits=bits,
                softcap=softcap is not None,
                window=window is not None,
                sinks=sinks is not None,
                # the interpreter multiplies the bit patterns of bfloat16
                wide_dot=INTERPRETED and query.dtype == torch.bfloat16,
            ),
        )
    if step.merges:
        _merge(step, out, sinks)
    return out


def attend_constants(
    cut: Geometry,
    head_dim: int,
    chunk_tokens: int,
    tiles: Tiles,
    *,
    large: bool = True,
    small: bool = True,
    bits: int = 16,
    softcap: bool = False,
    window: bool = False,
    sinks: bool = False,
    wide_dot: bool = False,
) -> dict[str, int | bool]:
    """The kernel's compile-time arguments, also for the cross-compilation."""
    return dict(
        KV_HEADS=cut.kv_heads,
        GROUP=cut.group,
        HEADS=cut.heads,
        D=head_dim,
        CHUNK=chunk_tokens,
        BLOCK_N=min(tiles.keys, chunk_tokens),
        LARGE_M=tiles.large,
        SMALL_M=tiles.small,
        HAS_LARGE=large,
        HAS_SMALL=small,
        BITS=bits,
        HAS_SOFTCAP=softcap,
        HAS_WINDOW=window,
        HAS_SINKS=sinks,
        WIDE_DOT=wide_dot,
    )


def append(pool_layer: Tensor | QuantisedLayer, key: Tensor, value: Tensor, plan: AttentionPlan) -> None:
    """As `kernels.attention.append_kv`, which checks the arguments, in one launch; quantises where the pool does."""
    _require(key.device, key.shape[2])
    words = slots_of(plan, key.device)
    _, kv_heads, n_chunks, chunk_tokens, head_dim = pool_layer.shape
    codes, scales, bits = _storage(pool_layer)
    key, value = (new if new.stride(2) == 1 else new.contiguous() for new in (key, value))
    append_kernel[(-(-plan.n_rows // APPEND_ROWS), kv_heads, 2)](
        key,
        value,
        codes,
        scales,
        words,
        n_chunks,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        KV_HEADS=kv_heads,
        D=head_dim,
        CHUNK=chunk_tokens,
        BLOCK_T=APPEND_ROWS,
        BITS=bits,
    )


def rotate(pool: Tensor, source: Tensor, target: Tensor, turn: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As `kernels.rotation.move_tokens`, which checks the arguments and makes the tables, in one launch for all
    layers."""
    layers, _, kv_heads, n_chunks, chunk_tokens, head_dim = pool.shape
    _require(pool.device, head_dim)
    rotate_kernel[(-(-len(source) // ROTATE_TOKENS), kv_heads, layers)](
        pool,
        source,
        target,
        turn,
        cos,
        sin,
        len(source),
        n_chunks * chunk_tokens,
        KV_HEADS=kv_heads,
        D=head_dim,
        ROTARY=2 * cos.shape[1],
        BLOCK_T=ROTATE_TOKENS,
    )


def _merge(step: Step, out: Tensor, sinks: Tensor | None) -> None:
    _, q_heads, head_dim = out.shape
    merge_kernel[(min(step.n_rows, len(out)), -(-q_heads // MERGE_HEADS))](
        step.part_out,
        step.part_lse,
        out,
        step.words,
        out if sinks is None else sinks,
        Q_HEADS=q_heads,
        D=head_dim,
        BLOCK_P=MERGE_PARTS,
        BLOCK_H=MERGE_HEADS,
        HAS_SINKS=sinks is not None,
        num_warps=4,
    )


def _storage(pool_layer: Tensor | QuantisedLayer) -> tuple[Tensor, Tensor, int]:
    """What the kernels take for a pool: values or codes, scales (unused if 16), bits (16 for any float)."""
    if isinstance(pool_layer, QuantisedLayer):
        return pool_layer.codes, pool_layer.scales, pool_layer.bits
    return pool_layer, pool_layer, 16


def _require(device: torch.device, head_dim: int) -> None:
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"the Triton kernels take heads of up to {MAX_HEAD_DIM} values, not {head_dim}")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"the Triton kernels run on a GPU, not on {device}: use backend='cpu', or TRITON_INTERPRET=1")


@cache
def _arch(device: torch.device) -> int:
    """The compute capability times ten; that of the interpreter is as good as any."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _programs(device: torch.device) -> int:
    """Two a multiprocessor: what fits by shared memory, and enough in flight to keep the memory busy (an estimate)."""
    if device.type != "cuda":
        return 16  # the interpreter runs them one after another; enough for several splits
    properties: Any = torch.cuda.get_device_properties(device)
    return 2 * int(properties.multi_processor_count)
