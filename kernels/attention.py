"""Attention over a chunked KV pool: one function, several backends that agree to rounding.

Invariant: `attend` reads only the chunks named by the plan, and no token that a row may not see influences it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

import stemcache.kernels.cpu as cpu
import stemcache.kernels.reference as reference
from stemcache.kernels.plan import AttentionPlan
from stemcache.kernels.quantised import QuantisedLayer

Backend = Literal["auto", "cpu", "triton", "reference"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def append_kv(
    pool_layer: Tensor | QuantisedLayer, key: Tensor, value: Tensor, plan: AttentionPlan, *, backend: Backend = "auto"
) -> None:
    """Write the step's keys and values, each [T, kv_heads, head_dim], to `plan.token_slots` of one pool layer.

    pool_layer: [2, kv_heads, chunks, chunk_tokens, head_dim], contiguous, the dtype of key and value; or a quantised
        layer of that shape, which takes Triton.
    Raises ValueError where shapes, dtypes or chunk ids do not fit the pool.
    """
    _check_pool(pool_layer, plan)
    expected = (plan.n_rows, pool_layer.shape[1], pool_layer.shape[4])
    dtype = key.dtype if isinstance(pool_layer, QuantisedLayer) else pool_layer.dtype
    for name, new in (("key", key), ("value", value)):
        if new.shape != expected or new.dtype != dtype:
            raise ValueError(f"{name} is {new.dtype} {tuple(new.shape)}, but plan and pool need {dtype} {expected}")
    if backend_for(pool_layer.device, backend) == "triton":
        triton_backend().append(pool_layer, key, value, plan)
        return
    if isinstance(pool_layer, QuantisedLayer):
        raise ValueError("only backend='triton' appends to a quantised layer")
    tokens = pool_layer.view(2, pool_layer.shape[1], -1, pool_layer.shape[4])
    slots = plan.derived(("append", pool_layer.device), lambda: _slots(plan, pool_layer.device))
    for side, new in zip(tokens, (key, value), strict=True):
        if isinstance(slots, slice):
            side[:, slots] = new.transpose(0, 1)
        else:
            side.index_copy_(1, slots, new.transpose(0, 1))


def attend(
    query: Tensor,
    pool_layer: Tensor | QuantisedLayer,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention of every row over its own sequence; the rows' keys must already be in the pool (`append_kv`).

    query: [T, q_heads, head_dim] in float32, bfloat16 or float16, rows in the plan's order; q_heads is a multiple of
        kv_heads and query head h reads KV head h // (q_heads / kv_heads).
    pool_layer: [2, kv_heads, chunks, chunk_tokens, head_dim], contiguous, the query's dtype; [0] keys, [1] values;
        or a quantised layer of that shape, which the GPU kernel reads as it is.
    scale: factor on the dot products, before softcap.
    window: a row at position p sees the keys at (p - window, p]; None sees all up to p.
    softcap: scores become `softcap * tanh(scores / softcap)` before the mask (Gemma 2, arXiv 2408.00118).
    sinks: [q_heads], one more logit per head that takes part in the softmax and has no value (GPT-OSS).
    backend: "auto" takes Triton for tensors on a GPU and the CPU's for those on a CPU; "reference" is float64 anywhere.
    Returns [T, q_heads, head_dim] in the query's dtype. Raises ValueError for combinations that cannot be served.
    """
    _check_pool(pool_layer, plan)
    _check_query(query, pool_layer, plan)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if sinks is not None and sinks.shape != (query.shape[1],):
        raise ValueError(f"sinks must hold one logit for each of {query.shape[1]} heads, got {tuple(sinks.shape)}")
    chosen = backend_for(pool_layer.device, backend)
    if chosen == "triton":
        output: Tensor = triton_backend().attend(
            query, pool_layer, plan, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
        return output
    if isinstance(pool_layer, QuantisedLayer):
        if chosen != "reference":
            raise ValueError("a quantised layer can be read by the backends 'triton' and 'reference' only")
        pool_layer = pool_layer.dequantise(torch.float32)
    run = reference.attend if chosen == "reference" else cpu.attend
    return run(query, pool_layer, plan, scale=scale, window=window, softcap=softcap, sinks=sinks)


def backend_for(device: torch.device, backend: Backend = "auto") -> Backend:
    """The backend that "auto" means on a device, or the one asked for. Raises ValueError if it cannot be had there."""
    if backend not in ("auto", "cpu", "triton", "reference"):
        raise ValueError(f"unknown attention backend {backend!r}: choose auto, cpu, triton or reference")
    if backend == "auto" and device.type in ("cpu", "cuda"):
        return "triton" if device.type == "cuda" else "cpu"
    if backend == "auto" or (backend == "cpu" and device.type != "cpu"):
        raise ValueError(f"no attention backend {backend!r} for {device} tensors")
    return backend


def triton_backend() -> ModuleType:
    """The module of the GPU backend, imported when first asked for. Raises ValueError where Triton is not installed."""
    try:
        import stemcache.kernels.triton_backend as backend
    except ImportError as error:
        raise ValueError(f"the GPU kernels need Triton ({error}): pip install 'stemcache[gpu]'") from error
    return backend


def _slots(plan: AttentionPlan, device: torch.device) -> slice | Tensor:
    """A slice where the step's slots follow one another (one sequence's prefill into one run), else their indices."""
    first, last = int(plan.token_slots[0]), int(plan.token_slots[-1])
    if last - first + 1 == plan.n_rows and bool((plan.token_slots[1:] > plan.token_slots[:-1]).all()):
        return slice(first, last + 1)
    return torch.from_numpy(plan.token_slots).to(device)


def _check_pool(pool_layer: Tensor | QuantisedLayer, plan: AttentionPlan) -> None:
    shape = pool_layer.shape
    tensors = (pool_layer.codes, pool_layer.scales) if isinstance(pool_layer, QuantisedLayer) else (pool_layer,)
    if len(shape) != 5 or shape[0] != 2 or not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(
            "a pool layer must be a contiguous [2, kv_heads, chunks, chunk_tokens, head_dim] tensor, "
            f"got {tuple(shape)}"
        )
    if shape[3] != plan.chunk_tokens:
        raise ValueError(f"the pool has chunks of {shape[3]} tokens, the plan of {plan.chunk_tokens}")
    if plan.max_chunk >= shape[2]:
        raise ValueError(f"the plan reads chunk {plan.max_chunk}, the pool holds {shape[2]} chunks")


def _check_query(query: Tensor, pool_layer: Tensor | QuantisedLayer, plan: AttentionPlan) -> None:
    if query.dim() != 3 or query.shape[0] != plan.n_rows or query.shape[2] != pool_layer.shape[4]:
        raise ValueError(
            f"query must be [{plan.n_rows}, q_heads, {pool_layer.shape[4]}] for this plan and pool, "
            f"got {tuple(query.shape)}"
        )
    if query.shape[1] % pool_layer.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads cannot be grouped over {pool_layer.shape[1]} KV heads")
    same = isinstance(pool_layer, QuantisedLayer) or query.dtype == pool_layer.dtype
    if query.dtype not in _DTYPES or not same:
        held = "codes" if isinstance(pool_layer, QuantisedLayer) else pool_layer.dtype
        raise ValueError(
            f"query ({query.dtype}) and pool ({held}) must have the same dtype: float32, bfloat16 or float16"
        )
    if query.device != pool_layer.device:
        raise ValueError(f"query is on {query.device}, the pool on {pool_layer.device}")
