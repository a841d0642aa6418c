"""The CPU backend: the fused kernel where it serves, else PyTorch's flash kernel over views of the pool, its partial
results merged by their log-sum-exp.

Invariant: a layer costs the calls of its schedule and one merge; nothing here depends on the number of chunks.

The flash kernel is `torch.ops.aten._scaled_dot_product_flash_attention_for_cpu`: the exact CPU form that also returns
the log-sum-exp (natural logarithm), which `scaled_dot_product_attention` hides. Two matrix products with a softmax
between were slower in most shapes tried and, with bfloat16 scores, less exact. It has no softcap; `_softcapped` has.

Partials are held as [K, group, kv_heads, head_dim], the order in which the kernel writes packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stemcache.kernels import fused
from stemcache.kernels.cpu_call import Call
from stemcache.kernels.cpu_schedule import schedule
from stemcache.kernels.merge import Merge, merge_aligned, merge_partials
from stemcache.kernels.plan import AttentionPlan

SCORES_AT_ONCE = 1 << 22
"""Elements of the score matrix that the softcap path holds at a time (16 MB in float32)."""


def attend(
    query: Tensor,
    pool_layer: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Shapes and meaning as in `kernels.attention.attend`, which checks the arguments."""
    if fused.serves(query, scale=scale, softcap=softcap):
        return fused.attend(query, pool_layer, plan, scale=scale, window=window, sinks=sinks)
    return attend_by_flash(query, pool_layer, plan, scale=scale, window=window, softcap=softcap, sinks=sinks)


def attend_by_flash(
    query: Tensor,
    pool_layer: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same, by calls of the flash kernel."""
    rows, q_heads, head_dim = query.shape
    kv_heads = pool_layer.shape[1]
    group = q_heads // kv_heads
    todo = schedule(plan, window=window, dtype=query.dtype, group=group, kv_heads=kv_heads)
    partials = [_call(query, pool_layer, call, scale, softcap) for call in todo.calls]
    if todo.direct and sinks is None:
        return partials[0][0].transpose(1, 2).reshape(rows, q_heads, head_dim)
    sink = None if sinks is None else sinks.float().view(kv_heads, group).t()
    return _merged(partials, todo.merges, rows, sink).transpose(1, 2).reshape(rows, q_heads, head_dim)


def _merged(
    partials: Sequence[tuple[Tensor, Tensor]], merges: Sequence[Merge], rows: int, sink: Tensor | None
) -> Tensor:
    """The calls' partials combined by row: [rows, group, kv_heads, head_dim]."""
    outputs, lses = zip(*partials, strict=True)
    if merges[0].aligned:  # then it has all partials, and is the only one
        return merge_aligned(_blocks(outputs, rows), _blocks(lses, rows), sink)
    output, lse = torch.cat(outputs), torch.cat(lses)
    if len(merges) == 1:
        return merge_partials(output, lse, merges[0], sink)
    merged = output.new_empty(rows, *output.shape[1:])
    for merge in merges:
        assert merge.rows is not None
        merged.index_copy_(0, merge.rows, merge_partials(output, lse, merge, sink))
    return merged


def _blocks(tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Cut so that every block has all rows, which costs a copy only where a call had some of them."""
    whole = tensors if all(len(each) % rows == 0 for each in tensors) else [torch.cat(list(tensors))]
    return [block for each in whole for block in torch.split(each, rows)]


def _call(query: Tensor, pool_layer: Tensor, call: Call, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Run one call. Returns the partials [K, group, kv_heads, head_dim] and their log-sum-exp [K, group, kv_heads],
    K = splits * batch * n_rows."""
    q_heads, head_dim = query.shape[1:]
    kv_heads = pool_layer.shape[1]
    group = q_heads // kv_heads
    rows = query if call.rows is None else query.index_select(0, call.rows)
    key, value = _keys_values(pool_layer, call)
    if call.packed:
        queries = rows.view(call.batch, call.n_rows, kv_heads, group, head_dim).transpose(1, 2)
        queries = queries.flatten(2, 3)  # a copy, unless n_rows is 1
        if call.doubled:
            queries = queries.expand(-1, -1, 2, -1)
        if call.splits > 1:
            queries = queries.expand(call.splits, -1, -1, -1)
    else:
        # KV heads become the batch, their query heads the heads: torch 2.13 also takes fewer KV heads than query heads,
        # but an older kernel would then read past the keys without a word
        if call.padding:
            rows = torch.cat([rows.new_zeros(call.padding, q_heads, head_dim), rows])
        queries = rows.view(-1, kv_heads, group, head_dim).permute(1, 2, 0, 3)
        key, value = (kv.transpose(0, 1).expand(-1, group, -1, -1) for kv in (key, value))
    if softcap is None:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, key, value, 0.0, call.causal, attn_mask=call.mask, scale=scale
        )
    else:
        output, lse = _softcapped(queries, key, value, call, scale, softcap)
    if call.doubled:
        output, lse = output[:, :, :1], lse[:, :, :1]
    output, lse = output.transpose(1, 2), lse.transpose(1, 2)  # [batch, kernel rows, heads, ...], as the kernel writes
    if call.packed:
        return output.reshape(-1, group, kv_heads, head_dim), lse.reshape(-1, group, kv_heads)
    return output.permute(1, 2, 0, 3)[call.padding :], lse.permute(1, 2, 0)[call.padding :]


def _keys_values(pool_layer: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Keys and values, each [batch or splits, kv_heads, keys, head_dim]: a view of the pool, or gathered chunks."""
    _, kv_heads, chunks, size, head_dim = pool_layer.shape
    n = call.stop - call.start
    if call.chunks is None:
        part = n // call.splits
        shape = (2, call.splits, kv_heads, part, head_dim)
        side, head = kv_heads * chunks * size * head_dim, chunks * size * head_dim
        start = pool_layer.storage_offset() + call.start * head_dim
        key, value = pool_layer.as_strided(shape, (side, part * head_dim, head, head_dim, 1), start).unbind()
        return key, value
    gathered = pool_layer.index_select(2, call.chunks).view(2, kv_heads, call.batch, -1, head_dim)
    key, value = gathered.narrow(3, call.start, n).transpose(1, 2).unbind()
    return key, value


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """The kernel's function with capped scores, in float32: query [b, heads, r, d], key and value [b, kv_heads, k, d]
    -> output [b, heads, r, d] in the query's dtype and lse [b, heads, r]. Queries go in blocks to bound memory."""
    batch, heads, rows, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    key, value = key.float().unsqueeze(2), value.float().unsqueeze(2)
    grouped = query.view(batch, kv_heads, heads // kv_heads, rows, head_dim)
    mask = call.mask
    if call.causal:
        mask = torch.full((1, 1, rows, keys), float("-inf")).triu_(1)
    block = max(1, SCORES_AT_ONCE // (batch * heads * keys))
    outputs, lses = [], []
    for start in range(0, rows, block):
        scores = grouped[:, :, :, start : start + block].float() @ key.transpose(-1, -2) * (scale / softcap)
        scores = scores.tanh_().mul_(softcap)
        if mask is not None:
            scores += (mask if mask.shape[2] == 1 else mask[:, :, start : start + block]).unsqueeze(1)
        lse = scores.logsumexp(dim=-1, keepdim=True)
        outputs.append((scores - lse).exp_() @ value)
        lses.append(lse.squeeze(-1))
    output, lse = torch.cat(outputs, dim=3), torch.cat(lses, dim=3)
    return output.view(batch, heads, rows, head_dim).to(query.dtype), lse.view(batch, heads, rows)
