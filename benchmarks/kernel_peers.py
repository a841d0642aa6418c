"""Other attention kernels on the same workloads: each guarded, so that whatever is not installed is left out by name.

Invariant: every peer is given the same numbers as our kernel (its pages are filled from our pool) and its result is
compared with the reference before it is timed. `duplicated` pages are a copy for each sequence; `shared` pages exist
once, which lets a kernel that reads them again find them in the second-level cache.

sdpa, Hydragen's formula and flex attention run on a CPU too and are tested there. The FlashInfer and FlashAttention
adapters follow their documented interfaces (flashinfer-python 0.7, flash-attn 2.8) and have not been run yet.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from kernel_workloads import CHUNK, Workload
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Run = Callable[[], Tensor]
"""One attention call: [T, q_heads, head_dim]."""


class UnsupportedError(Exception):
    """Why a peer has nothing to show for a workload: printed in its cell."""


@dataclass(frozen=True)
class Inputs:
    """query: [T, q_heads, head_dim]; pool: [2, kv_heads, chunks, C, head_dim]."""

    workload: Workload
    query: Tensor
    pool: Tensor

    @property
    def scale(self) -> float:
        return float(self.query.shape[2] ** -0.5)

    def gathered(self) -> Tensor:
        """[2, B, kv_heads, L, head_dim]: each sequence's keys and values in one piece; all must be equally long."""
        stops = {s.stop for s in self.workload.sequences}
        if not self.workload.decode or len(stops) > 1:
            raise UnsupportedError("needs decode rows of one length")
        self.require_memory(len(self.workload.sequences) * stops.copy().pop())
        index = np.stack([s.chunks for s in self.workload.sequences]).ravel().astype(np.int64)
        rows = self.pool.index_select(2, torch.from_numpy(index).to(self.pool.device))
        rows = rows.view(2, self.pool.shape[1], len(self.workload.sequences), -1, self.pool.shape[4])
        return rows[:, :, :, : stops.pop()].transpose(1, 2).contiguous()

    def require_memory(self, tokens: int) -> None:
        """Raise UnsupportedError where a copy of so many tokens would not fit beside the pool."""
        size = 2 * tokens * self.pool.shape[1] * self.pool.shape[4] * self.pool.element_size()
        free = torch.cuda.mem_get_info(self.pool.device)[0] if self.pool.is_cuda else 1 << 32
        if size > 0.4 * free:
            raise UnsupportedError(f"a copy for each sequence takes {size / 2**30:.0f} GiB")

    def pages(self, *, shared: bool) -> tuple[Tensor, list[list[int]]]:
        """(pages [n, 2, kv_heads, C, head_dim], page ids of each sequence)."""
        tables = [s.chunks[: -(-s.stop // CHUNK)] for s in self.workload.sequences]
        if not shared:
            self.require_memory(CHUNK * sum(len(table) for table in tables))
        flat = np.concatenate(tables)
        ids, index = np.unique(flat, return_inverse=True) if shared else (flat, np.arange(len(flat)))
        pages = self.pool.index_select(2, torch.from_numpy(ids.astype(np.int64)).to(self.pool.device))
        ends = np.cumsum([len(table) for table in tables])[:-1]
        return pages.permute(2, 0, 1, 3, 4).contiguous(), [part.tolist() for part in np.split(index, ends)]


def sdpa(inputs: Inputs) -> Run:
    """PyTorch's attention over gathered keys and values."""
    key, value = inputs.gathered()
    query = inputs.query.unsqueeze(2)
    return lambda: scaled_dot_product_attention(query, key, value, scale=inputs.scale, enable_gqa=True).squeeze(2)


def hydragen(inputs: Inputs) -> Run:
    """Hydragen's formula (arXiv 2402.05099) on PyTorch's flash kernel: the shared part with all rows as one
    sequence, the rest one by one, merged by the log-sum-exp."""
    shared = inputs.workload.shared_tokens()
    if not shared:
        raise UnsupportedError("nothing shared by all")
    chunks = inputs.workload.sequences[0].chunks[: shared // CHUNK].astype(np.int64)
    private = inputs.gathered()[:, :, :, shared:]
    prefix = inputs.pool.index_select(2, torch.from_numpy(chunks).to(inputs.pool.device)).flatten(2, 3)
    batch, q_heads, head_dim = inputs.query.shape
    group = q_heads // prefix.shape[1]
    prefix = prefix.contiguous().unsqueeze(1)
    private_key, private_value = private.contiguous()

    def run() -> Tensor:
        grouped = inputs.query.view(batch, -1, group, head_dim)
        packed = grouped.transpose(0, 1).reshape(1, -1, batch * group, head_dim)
        first, first_lse = _flash(packed, prefix[0], prefix[1], inputs.scale)
        second, second_lse = _flash(grouped, private_key, private_value, inputs.scale)
        first = first.view(-1, batch, group, head_dim).transpose(0, 1)
        first_lse = first_lse.view(-1, batch, group).transpose(0, 1)
        weight = torch.sigmoid(first_lse - second_lse).unsqueeze(-1)
        merged = weight * first.float() + (1 - weight) * second.float()
        return merged.to(inputs.query.dtype).reshape(batch, q_heads, head_dim)

    return run


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp of unmasked attention, [B, heads, rows, d]."""
    if query.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, scale=scale)
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    return found[0], found[1][:, :, : query.shape[2]]


def flex(inputs: Inputs) -> Run:
    """PyTorch's flex attention over the whole pool, with a mask that says whose each chunk is: paged, and shared."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = inputs.pool.device
    chunks = inputs.pool.shape[2]
    visible = torch.zeros(inputs.workload.rows, chunks, dtype=torch.bool)
    depth = torch.zeros(chunks, dtype=torch.long)
    position = torch.cat([torch.arange(s.start, s.stop) for s in inputs.workload.sequences]).to(device)
    row = 0
    for s in inputs.workload.sequences:
        ids = torch.from_numpy(s.chunks.astype(np.int64))
        visible[row : row + s.stop - s.start, ids] = True
        depth[ids] = torch.arange(len(ids))
        row += s.stop - s.start
    visible, depth = visible.to(device), depth.to(device)

    def seen(_batch: Tensor, _head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return visible[q, kv // CHUNK] & (depth[kv // CHUNK] * CHUNK + kv % CHUNK <= position[q])

    compiled: Any = torch.compile(flex_attention) if inputs.pool.is_cuda else flex_attention
    mask = create_block_mask(seen, None, None, inputs.workload.rows, chunks * CHUNK, device=str(device))
    query = inputs.query.transpose(0, 1).unsqueeze(0)
    key, value = inputs.pool.flatten(2, 3).unsqueeze(1)
    return lambda: compiled(query, key, value, block_mask=mask, scale=inputs.scale, enable_gqa=True)[0].transpose(0, 1)


def flashinfer_decode(inputs: Inputs, *, shared: bool) -> Run:
    """FlashInfer's batch decode on tensor cores."""
    import flashinfer

    if not inputs.workload.decode:
        raise UnsupportedError("decode only")
    pages, tables = inputs.pages(shared=shared)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=inputs.pool.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    _, q_heads, head_dim = inputs.query.shape
    indptr, indices, last = _table(tables, [s.stop for s in inputs.workload.sequences], inputs.pool.device)
    wrapper.plan(
        *(indptr, indices, last, q_heads, inputs.pool.shape[1], head_dim, CHUNK),
        q_data_type=inputs.query.dtype,
        kv_data_type=inputs.pool.dtype,
    )
    return lambda: wrapper.run(inputs.query, pages)


def flashinfer_cascade(inputs: Inputs) -> Run:
    """FlashInfer's multi-level cascade: the shared beginning as one level, the rest as the other."""
    import flashinfer

    length = inputs.workload.shared_tokens()
    if not inputs.workload.decode or not length:
        raise UnsupportedError("needs decode rows that all share a beginning")
    pages, tables = inputs.pages(shared=True)
    device, batch, n = inputs.pool.device, len(tables), length // CHUNK
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "HND")
    _, q_heads, head_dim = inputs.query.shape
    top = _table([tables[0][:n]], [length], device)
    stops = [s.stop - length for s in inputs.workload.sequences]
    own = _table([table[n:] for table in tables], stops, device)
    rows = [torch.tensor([0, batch]), torch.arange(batch + 1)]
    wrapper.plan(
        [part.int().to(device) for part in rows],
        *([top[i], own[i]] for i in range(3)),
        *(q_heads, inputs.pool.shape[1], head_dim, CHUNK),
        q_data_type=inputs.query.dtype,
    )
    return lambda: wrapper.run(inputs.query, pages)


def flash_attention(inputs: Inputs) -> Run:
    """FlashAttention's split-KV decode over each sequence's own copy."""
    from flash_attn import flash_attn_with_kvcache

    key, value = (side.transpose(1, 2).contiguous() for side in inputs.gathered())
    query = inputs.query.unsqueeze(1)
    return lambda: flash_attn_with_kvcache(query, key, value, softmax_scale=inputs.scale).squeeze(1)


def _table(tables: list[list[int]], stops: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's page table: where each sequence's pages begin, the pages, tokens in its last page."""
    indptr = np.cumsum([0] + [len(table) for table in tables])
    last = [(stop - 1) % CHUNK + 1 for stop in stops]
    parts = (indptr, np.concatenate(tables), np.array(last))
    indptr_, indices, last_ = (torch.from_numpy(part.astype(np.int32)).to(device) for part in parts)
    return indptr_, indices, last_


def peers() -> dict[str, Callable[[Inputs], Run]]:
    """The peers that can be imported here, by the name of their column."""
    found: dict[str, Callable[[Inputs], Run]] = {"sdpa, copies": sdpa, "hydragen": hydragen, "flex, shared": flex}
    if importlib.util.find_spec("flashinfer"):
        found["flashinfer, copies"] = lambda inputs: flashinfer_decode(inputs, shared=False)
        found["flashinfer, shared"] = lambda inputs: flashinfer_decode(inputs, shared=True)
        found["flashinfer cascade"] = flashinfer_cascade
    if importlib.util.find_spec("flash_attn"):
        found["flash-attn, copies"] = flash_attention
    return found
