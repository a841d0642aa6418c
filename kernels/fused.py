"""The CPU backend in bfloat16 where the processor multiplies bfloat16 pairs: one compiled kernel for all of a step.

Invariant: a layer is one pass of the team of threads over the step's units, and one over the rows to merge, if any.

PyTorch's flash kernel leaves its products to MKL, which on AMD's processors widens them to float32 first. Not on Intel
processors with AMX, whose tiles MKL does use: there the flash kernel stays (`kernels.cpu`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from math import e, log2

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stemcache.kernels.bfloat16_pairs import is_preferred
from stemcache.kernels.fused_units import PACKED_ROWS, Units, cut
from stemcache.kernels.plan import AttentionPlan
from stemcache.kernels.stages import Job, Stages


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
    threads, stages = torch.get_num_threads(), Stages()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    renew = add_to(stages, query, out, pool_layer, threads, scale=scale, window=window, sinks=sinks)
    renew(plan)
    stages.run(threads)
    return out


class AttentionJob(Job):
    """A layer's work. query, pool, out, sinks (0: none) and the arrays are addresses, query_row, query_head, side (from
    keys to values) and head_side (from a KV head to the next) strides in bytes. scale: log2(e) included. The counters
    are of units, threads that attend, rows to merge, and threads that merge.

    What a plan decides begins with chunk_tokens. window: 0 if none.
    """

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("counters", "query", "query_row", "query_head")),
        *((name, ctypes.c_int64) for name in ("pool", "side", "head_side")),
        *((name, ctypes.c_int64) for name in ("out", "sinks", "kv_heads", "group", "head_dim")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("chunk_tokens", "window", "scratch", "scratch_size", "width")),
        *((name, ctypes.c_int64) for name in ("partials", "maxima", "sums", "n_units", "units", "rows")),
        *((name, ctypes.c_int64) for name in ("positions", "chunks", "n_merged", "merged_rows", "merged_begin")),
        ("merged_partials", ctypes.c_int64),
    ]

    def follow(self, planned: AttentionJob) -> None:
        """Take over what a plan decides."""
        begin = AttentionJob.chunk_tokens.offset
        ctypes.memmove(
            ctypes.addressof(self) + begin, ctypes.addressof(planned) + begin, ctypes.sizeof(AttentionJob) - begin
        )


def add_to(
    stages: Stages,
    query: Tensor,
    out: Tensor,
    pool_layer: Tensor,
    threads: int,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Callable[[AttentionPlan], None]:
    """Write down what `attend` does, but for the plan. out: [T, q_heads, head_dim], contiguous.

    Returns a function that is to be called with the plan of a run before it; the plan must stay until its end.
    """
    from stemcache.kernels.fused_kernel import compiled

    assert out.is_contiguous()
    _, kv_heads, _, _, head_dim = pool_layer.shape
    group = query.shape[1] // kv_heads
    logits = None if sinks is None else sinks.float() * log2(e)
    job = AttentionJob(
        query=query.data_ptr(),
        query_row=query.stride(0) * 2,
        query_head=query.stride(1) * 2,
        pool=pool_layer.data_ptr(),
        side=pool_layer.stride(0) * 2,
        head_side=pool_layer.stride(1) * 2,
        out=out.data_ptr(),
        sinks=0 if logits is None else logits.data_ptr(),
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        scale=scale * log2(e),
    )
    for function in compiled():  # a plan that has nothing to merge costs the second one's call
        stages.add(function.address, job, query, out, pool_layer, logits)

    def renew(plan: AttentionPlan) -> None:
        last = plan.derived(("last position",), lambda: int(plan.positions.max()))
        reached = None if window is None or window > last else window
        key = ("fused", reached, group, kv_heads, head_dim, threads)
        job.follow(plan.derived(key, lambda: _Work.of(plan, reached, group, kv_heads, head_dim, threads)).job)

    return renew


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """A plan's units, the memory that its threads and partial results need, and what a layer's job says of them."""

    units: Units
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
        partials = memory[1].data_ptr()
        job = AttentionJob(
            chunk_tokens=plan.chunk_tokens,
            window=window or 0,
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
        return cls(units, job, memory, plan.positions)
