"""The CPU backend in bfloat16 where the processor multiplies bfloat16 pairs: one compiled kernel for all of a step.

Invariant: a layer is one pass of the team of threads over the step's units, and one over the rows to merge, if any.

PyTorch's flash kernel leaves its products to MKL, which on AMD's processors widens them to float32 first. Not on Intel
processors with AMX, whose tiles MKL does use: there the flash kernel stays (`kernels.cpu`).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import e, log2

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stemcache.kernels.bfloat16_pairs import is_preferred
from stemcache.kernels.fused_units import PACKED_ROWS, Units, cut
from stemcache.kernels.plan import AttentionPlan
from stemcache.kernels.stages import Stage, run_stages


def serves(query: Tensor, *, scale: float, softcap: float | None) -> bool:
    """Whether the kernel is there for these arguments, which are otherwise the flash kernel's."""
    return (
        query.dtype == torch.bfloat16
        and query.shape[2] % 16 == 0
        and query.stride(2) == 1
        and softcap is None
        and scale > 0
        and is_preferred()
    )


def attend(
    query: Tensor,
    pool_layer: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Shapes and meaning as in `kernels.attention.attend`, for what `serves` says yes to."""
    threads = torch.get_num_threads()
    out, found = stages(query, pool_layer, plan, threads, scale=scale, window=window, sinks=sinks)
    run_stages(found, threads)
    return out


class AttentionJob(ctypes.Structure):
    """A layer's work. query, pool, out, sinks (0: none), counters (int64[4], two for each function) and the arrays are
    addresses, query_row, query_head, side (from keys to values) and head_side (from a KV head to the next) strides in
    bytes. window: 0 if none. scale: log2(e) included."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("query", "query_row", "query_head", "pool", "side", "head_side")),
        *((name, ctypes.c_int64) for name in ("out", "sinks", "kv_heads", "group", "head_dim", "chunk_tokens")),
        *((name, ctypes.c_int64) for name in ("window", "counters", "scratch", "scratch_size", "width")),
        *((name, ctypes.c_int64) for name in ("partials", "maxima", "sums", "n_units", "units", "rows")),
        *((name, ctypes.c_int64) for name in ("positions", "chunks", "n_merged", "merged_rows", "merged_begin")),
        ("merged_partials", ctypes.c_int64),
        ("scale", ctypes.c_double),
    ]


def stages(
    query: Tensor,
    pool_layer: Tensor,
    plan: AttentionPlan,
    threads: int,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, list[Stage]]:
    """What `attend` returns, and the stages that compute it. A plan's are for one run at a time."""
    from stemcache.kernels.fused_kernel import compiled

    if window is not None and window > int(plan.positions.max()):
        window = None
    _, kv_heads, _, _, head_dim = pool_layer.shape
    group = query.shape[1] // kv_heads
    key = ("fused", window, group, kv_heads, head_dim, threads)
    work = plan.derived(key, lambda: _Work.of(plan, window, group, kv_heads, head_dim, threads))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    logits = None if sinks is None else sinks.float() * log2(e)
    job = work.job
    job.query, job.pool, job.out = query.data_ptr(), pool_layer.data_ptr(), out.data_ptr()
    job.query_row, job.query_head = query.stride(0) * 2, query.stride(1) * 2
    job.side, job.head_side = pool_layer.stride(0) * 2, pool_layer.stride(1) * 2
    job.sinks = 0 if logits is None else logits.data_ptr()
    job.scale = scale * log2(e)
    work.counters[:] = 0
    functions = compiled() if len(work.units.merged_rows) else compiled()[:1]
    kept = work, query, pool_layer, out, logits
    return out, [Stage(function.address, ctypes.addressof(job), kept) for function in functions]


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """A plan's units, the memory that its threads and partial results need, and all that a layer's job says of them."""

    units: Units
    counters: NDArray[np.int64]
    job: AttentionJob
    memory: tuple[Tensor, ...]  # what the job's addresses point to
    positions: NDArray[np.int64]

    @classmethod
    def of(
        cls, plan: AttentionPlan, window: int | None, group: int, kv_heads: int, head_dim: int, threads: int
    ) -> _Work:
        from stemcache.kernels.fused_kernel import scratch_size

        units = cut(plan, window=window, group=group, kv_heads=kv_heads, threads=threads)
        width = -(-max(PACKED_ROWS, group) // 16) * 16
        size = -(-scratch_size(width, head_dim) // 64) * 64
        results = units.n_partials * kv_heads * group
        memory = torch.empty(threads * size, dtype=torch.uint8), torch.empty(results * (head_dim + 2))
        counters = np.zeros(4, np.int64)
        partials = memory[1].data_ptr()
        job = AttentionJob(
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            chunk_tokens=plan.chunk_tokens,
            window=window or 0,
            counters=counters.ctypes.data,
            scratch=memory[0].data_ptr(),
            scratch_size=size,
            width=width,
            partials=partials,
            maxima=partials + 4 * results * head_dim,
            sums=partials + 4 * results * (head_dim + 1),
            n_units=len(units.units),
            units=units.units.ctypes.data,
            rows=units.rows.ctypes.data,
            positions=plan.positions.ctypes.data,
            chunks=units.chunks.ctypes.data,
            n_merged=len(units.merged_rows),
            merged_rows=units.merged_rows.ctypes.data,
            merged_begin=units.merged_begin.ctypes.data,
            merged_partials=units.merged_partials.ctypes.data,
        )
        return cls(units, counters, job, memory, plan.positions)
