"""The CPU backend in bfloat16 where the processor multiplies bfloat16 pairs: one compiled kernel for all of a step.

Invariant: a layer is one pass of the team of threads over the step's units, and one over the rows to merge, if any.

PyTorch's flash kernel leaves its products to MKL, which on AMD's processors widens them to float32 first. Not on Intel
processors with AMX, whose tiles MKL does use: there the flash kernel stays (`kernels.cpu`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import e, log2

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stemcache.kernels import openmp
from stemcache.kernels.bfloat16_pairs import is_preferred
from stemcache.kernels.fused_units import PACKED_ROWS, Units, cut
from stemcache.kernels.plan import AttentionPlan


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
    from stemcache.kernels.fused_kernel import compiled

    if window is not None and window > int(plan.positions.max()):
        window = None
    kv_heads, group = pool_layer.shape[1], query.shape[1] // pool_layer.shape[1]
    threads = torch.get_num_threads()
    key = ("fused", window, group, kv_heads, query.shape[2], threads)
    work = plan.derived(key, lambda: _Work.of(plan, window, group, kv_heads, query.shape[2], threads))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    logits = None if sinks is None else sinks.float() * log2(e)
    job = work.job
    job["query"], job["pool"], job["out"] = query.data_ptr(), pool_layer.data_ptr(), out.data_ptr()
    job["query_row"], job["query_head"] = query.stride(0) * 2, query.stride(1) * 2
    job["side"], job["head_side"] = pool_layer.stride(0) * 2, pool_layer.stride(1) * 2
    job["sinks"] = 0 if logits is None else logits.data_ptr()
    job["scale"] = scale * log2(e)
    attend_units, merge_rows = compiled()
    work.counters[:] = 0
    openmp.run(attend_units.address, job.ctypes.data, threads)
    if len(work.units.merged_rows):
        work.counters[:] = 0
        openmp.run(merge_rows.address, job.ctypes.data, threads)
    return out


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """A plan's units, the memory that its threads and partial results need, and all that a layer's job says of them."""

    units: Units
    counters: NDArray[np.int64]
    job: NDArray[np.void]
    memory: tuple[Tensor, ...]  # what the job's addresses point to
    positions: NDArray[np.int64]

    @classmethod
    def of(
        cls, plan: AttentionPlan, window: int | None, group: int, kv_heads: int, head_dim: int, threads: int
    ) -> _Work:
        from stemcache.kernels.fused_kernel import JOB, scratch_size

        units = cut(plan, window=window, group=group, kv_heads=kv_heads, threads=threads)
        width = -(-max(PACKED_ROWS, group) // 16) * 16
        size = -(-scratch_size(width, head_dim) // 64) * 64
        results = units.n_partials * kv_heads * group
        memory = torch.empty(threads * size, dtype=torch.uint8), torch.empty(results * (head_dim + 2))
        counters = np.zeros(2, np.int64)
        job = np.zeros(1, JOB)
        partials = memory[1].data_ptr()
        for name, value in {
            "kv_heads": kv_heads,
            "group": group,
            "head_dim": head_dim,
            "chunk_tokens": plan.chunk_tokens,
            "window": window or 0,
            "counters": counters.ctypes.data,
            "scratch": memory[0].data_ptr(),
            "scratch_size": size,
            "width": width,
            "partials": partials,
            "maxima": partials + 4 * results * head_dim,
            "sums": partials + 4 * results * (head_dim + 1),
            "n_units": len(units.units),
            "units": units.units.ctypes.data,
            "rows": units.rows.ctypes.data,
            "positions": plan.positions.ctypes.data,
            "chunks": units.chunks.ctypes.data,
            "n_merged": len(units.merged_rows),
            "merged_rows": units.merged_rows.ctypes.data,
            "merged_begin": units.merged_begin.ctypes.data,
            "merged_partials": units.merged_partials.ctypes.data,
        }.items():
            job[name] = value
        return cls(units, counters, job, memory, plan.positions)
