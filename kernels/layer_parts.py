"""What a decoder layer does between its products, in bfloat16 on a CPU: norm, rotation and append, gate, sum; compiled.

Invariant: what transformers' layers round to bfloat16 on the way is rounded here, too, so results differ from theirs
at most where a sum in another order, or an exponential, falls on the other side of a rounding.

A norm is ten of PyTorch's operations and a rotation a dozen, 20 to 45 us whatever there is to compute: a third of a
decode step of one sequence of SmolLM2-135M's shape. Here each is a stage, one pass over the rows.

All tensors are bfloat16 on a CPU with AVX512_BF16, and contiguous where nothing else is said.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from stemcache.kernels import cpu, fused
from stemcache.kernels.plan import AttentionPlan
from stemcache.kernels.products import PairProduct
from stemcache.kernels.stages import Stage, run_stages

Activation = Literal["silu", "gelu_tanh"]
LANES: Final = 16
"""Numbers of a vector."""
_BLOCK: Final = 4 << 10
"""Numbers that a thread takes at a time: about one microsecond."""


class NormJob(ctypes.Structure):
    """rows, weight and out (bfloat16) are addresses; a row is `heads` of `width` each, and rows lie `stride` bytes
    apart, in both."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "weight", "out", "n_rows", "heads", "width")),
        *((name, ctypes.c_int64) for name in ("stride", "block", "taken", "is_above_one")),
        ("epsilon", ctypes.c_double),
    ]


class RotationJob(ctypes.Structure):
    """rows, cos and sin (0: nothing is turned), slots (int64) and pool are addresses; `side` is from keys to values,
    `head_side` from a KV head to the next, in bytes."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "cos", "sin", "slots", "pool", "side", "head_side")),
        *((name, ctypes.c_int64) for name in ("n_rows", "q_heads", "kv_heads", "head_dim", "block", "taken")),
    ]


class GateJob(ctypes.Structure):
    """rows and out (bfloat16) are addresses. A row is `width` gates and as many values."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "out", "n_rows", "width", "block", "taken", "is_gelu")]


class SumJob(ctypes.Structure):
    """rows and to (bfloat16) are addresses of `count` numbers."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "to", "count", "block", "taken")]


class Norm(NamedTuple):
    """weight * (row / sqrt(mean(row ** 2) + epsilon)) (RMSNorm, arXiv 1910.07467), the quotient rounded first.

    weight: [width]. is_above_one: the weights are given as what they are above one, and only the result is rounded
    (Gemma's).
    """

    weight: Tensor
    epsilon: float
    is_above_one: bool = False


class LayerStages:
    """A layer's stages, written down as their results are asked for: the numbers are there after `run`.

    Methods raise ValueError for widths, and halves of heads, that are no multiples of 16, and for tensors that do not
    fit each other: the kernels would read and write past their ends.
    """

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._stages: list[Stage] = []

    def run(self) -> None:
        """Compute what has been asked for."""
        if self._stages:
            run_stages(self._stages, self._threads)
            self._stages = []

    def norm(self, rows: Tensor, norm: Norm, *, in_place: bool = False) -> Tensor:
        """rows: [T, width]; or [T, heads, width], each head by itself, and rows may lie apart. Returns rows,
        overwritten, or a tensor like them."""
        if norm.weight.shape != rows.shape[-1:] or norm.weight.dtype != rows.dtype:
            raise ValueError(f"weights {_kind(norm.weight)} are no norm's of rows {_kind(rows)}")
        out = rows if in_place else torch.empty_like(rows)
        heads, width = rows.shape[1] if rows.dim() == 3 else 1, _whole(rows.shape[-1])
        sizes = rows.shape[0], heads, width, 2 * rows.stride(0), _rows(heads * width), 0
        at = rows.data_ptr(), norm.weight.data_ptr(), out.data_ptr()
        self._add(0, NormJob(*at, *sizes, norm.is_above_one, norm.epsilon), rows, norm, out)
        return out

    def rotate_and_append(
        self, heads: Tensor, turn: tuple[Tensor, Tensor] | None, pool_layer: Tensor, plan: AttentionPlan
    ) -> Tensor:
        """Turn queries and keys (RoPE, arXiv 2104.09864, by halves), and write keys and values to the pool.

        heads: [T, q_heads + 2 * kv_heads, head_dim], contiguous: queries, which are overwritten, keys and values.
        turn: cosines and sines, each [T, head_dim], contiguous; None turns nothing. Products with them are rounded.
        pool_layer: [2, kv_heads, chunks, chunk_tokens, head_dim], contiguous.
        Returns the queries, a view [T, q_heads, head_dim].
        """
        _, kv_heads, _, _, head_dim = pool_layer.shape
        _whole(head_dim // 2)
        if heads.shape[0] != plan.n_rows or heads.shape[2] != head_dim or heads.dtype != pool_layer.dtype:
            raise ValueError(f"heads {_kind(heads)} do not fit {plan.n_rows} rows and a pool {_kind(pool_layer)}")
        for part in turn or ():
            if part.shape != (plan.n_rows, head_dim) or part.dtype != heads.dtype or not part.is_contiguous():
                raise ValueError(f"heads {_kind(heads)} are not turned by {_kind(part)}")
        q_heads = heads.shape[1] - 2 * kv_heads
        at = heads.data_ptr(), *((part.data_ptr() for part in turn) if turn else (0, 0))
        slots = plan.derived(("slots",), lambda: plan.token_slots.ctypes.data)
        sides = 2 * pool_layer.stride(0), 2 * pool_layer.stride(1)
        shape = plan.n_rows, q_heads, kv_heads, head_dim
        job = RotationJob(*at, slots, pool_layer.data_ptr(), *sides, *shape, _rows(heads.shape[1] * head_dim), 0)
        self._add(1, job, heads, turn, pool_layer, plan)
        return heads[:, :q_heads]

    def gate(self, rows: Tensor, activation: Activation) -> Tensor:
        """activation(gates) * values (arXiv 2002.05202), the activation rounded first. rows: [T, 2 * width], gates and
        values. Returns [T, width]."""
        n_rows, width = rows.shape[0], _whole(rows.shape[1] // 2)
        out = rows.new_empty((n_rows, width))
        job = GateJob(rows.data_ptr(), out.data_ptr(), n_rows, width, _rows(width), 0, activation == "gelu_tanh")
        self._add(2, job, rows, out)
        return out

    def add(self, rows: Tensor, to: Tensor) -> Tensor:
        """to += rows, both of one shape. Returns `to`."""
        _whole(rows.shape[-1])
        if rows.shape != to.shape or rows.dtype != to.dtype or not to.is_contiguous():
            raise ValueError(f"rows {_kind(rows)} cannot be added to {_kind(to)}")
        self._add(3, SumJob(rows.data_ptr(), to.data_ptr(), to.numel(), _BLOCK, 0), rows, to)
        return to

    def product(self, compute: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """compute(rows): a stage if it is a `PairProduct`; else what was asked for is computed now, and so is it."""
        if isinstance(compute, PairProduct):
            out, stage = compute.stage(rows, self._threads)
            self._stages.append(stage)
            return out
        self.run()
        return compute(rows)

    def attend(
        self,
        query: Tensor,
        pool_layer: Tensor,
        plan: AttentionPlan,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As `kernels.attention.attend` on a CPU: stages if they are there for it; else all is computed now."""
        if fused.serves(query, scale=scale, softcap=softcap):
            out, stages = fused.stages(query, pool_layer, plan, self._threads, scale=scale, window=window, sinks=sinks)
            self._stages += stages
            return out
        self.run()
        return cpu.attend(query, pool_layer, plan, scale=scale, window=window, softcap=softcap, sinks=sinks)

    def _add(self, function: int, job: ctypes.Structure, *kept: object) -> None:
        self._stages.append(Stage(_functions()[function], ctypes.addressof(job), (job, kept)))


def _whole(width: int) -> int:
    """The width, of which vectors leave no rest. Raises ValueError."""
    if width % LANES:
        raise ValueError(f"the parts of a layer take multiples of {LANES} numbers, not {width}")
    return width


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _rows(width: int) -> int:
    return max(1, _BLOCK // width)


@cache
def _functions() -> list[int]:
    from stemcache.kernels.layer_kernel import compiled

    return [int(each.address) for each in compiled()]
