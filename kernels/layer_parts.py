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
from functools import cache, partial
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from stemcache.kernels import cpu, fused
from stemcache.kernels.layer_memory import LayerMemory
from stemcache.kernels.plan import AttentionPlan
from stemcache.kernels.products import PairProduct
from stemcache.kernels.stages import Job, Stages

Activation = Literal["silu", "gelu_tanh"]
LANES: Final = 16
"""Numbers of a vector."""
_BLOCK: Final = 4 << 10
"""Numbers that a thread takes at a time: about one microsecond."""


class NormJob(Job):
    """rows, weight and out (bfloat16) are addresses; a row is `heads` of `width` each, and rows lie `stride` bytes
    apart, in both."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("counters", "rows", "weight", "out", "n_rows", "heads", "width")),
        *((name, ctypes.c_int64) for name in ("stride", "block", "is_above_one")),
        ("epsilon", ctypes.c_double),
    ]


class RotationJob(Job):
    """rows, cos and sin (0: nothing is turned), slots (int64) and pool are addresses; `side` is from keys to values,
    `head_side` from a KV head to the next, in bytes."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("counters", "rows", "cos", "sin", "slots", "pool", "side", "head_side")),
        *((name, ctypes.c_int64) for name in ("n_rows", "q_heads", "kv_heads", "head_dim", "block")),
    ]


class GateJob(Job):
    """rows and out (bfloat16) are addresses. A row is `width` gates and as many values."""

    _fields_ = [(name, ctypes.c_int64) for name in ("counters", "rows", "out", "n_rows", "width", "block", "is_gelu")]


class SumJob(Job):
    """rows and to (bfloat16) are addresses of `count` numbers."""

    _fields_ = [(name, ctypes.c_int64) for name in ("counters", "rows", "to", "count", "block")]


Turn = tuple[Tensor, Tensor]
"""Cosines and sines."""
Renew = Callable[[Turn | None, AttentionPlan], None]


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

    memory: where results lie, which others will overwrite. With it the layer can be computed again from what was
    written down (`repeat`), which holds for an input of the same shape.

    Methods raise ValueError for widths, and halves of heads, that are no multiples of 16, and for tensors that do not
    fit each other: the kernels would read and write past their ends.
    """

    def __init__(self, memory: LayerMemory | None = None) -> None:
        self._threads = torch.get_num_threads()
        self._memory = memory
        self._n_results = 0
        self._stages = Stages()
        self._again: list[Callable[[Turn | None, AttentionPlan], object]] = []

    def begin(self, rows: Tensor) -> Tensor:
        """The layer's input [T, width], which need not be contiguous. Returns it, or memory with the same numbers."""
        self._input = rows.contiguous() if self._memory is None else self._result(*rows.shape).copy_(rows)
        return self._input

    def run(self) -> None:
        """Compute what has been asked for."""
        if len(self._stages):
            run = partial(self._stages.run, self._threads)
            self._stages = Stages()
            run()
            self._again.append(lambda *_: run())

    def end(self, result: Tensor) -> Tensor:
        """Compute what has been asked for. Returns the layer's result, the caller's own."""
        self.run()
        self._output = result
        return result if self._memory is None else result.clone()

    def repeat(self, rows: Tensor, turn: Turn | None, plan: AttentionPlan) -> Tensor:
        """The same again with another input, and what `rotate_and_append` and `attend` were given. Returns as `end`.

        Raises ValueError as they do.
        """
        assert self._memory is not None, "results would overwrite those of the first time, which are their caller's"
        self._input.copy_(rows)
        for again in self._again:
            again(turn, plan)
        return self._output.clone()

    def norm(self, rows: Tensor, norm: Norm, *, in_place: bool = False) -> Tensor:
        """rows: [T, width]; or [T, heads, width], each head by itself. Returns rows, overwritten (they may lie
        apart), or a tensor like them."""
        if norm.weight.shape != rows.shape[-1:] or norm.weight.dtype != rows.dtype:
            raise ValueError(f"weights {_kind(norm.weight)} are no norm's of rows {_kind(rows)}")
        if not in_place and not rows.is_contiguous():
            raise ValueError(f"rows {_kind(rows)} that lie apart have their norm in place")
        out = rows if in_place else self._result(*rows.shape)
        heads, width = rows.shape[1] if rows.dim() == 3 else 1, _whole(rows.shape[-1])
        sizes = rows.shape[0], heads, width, 2 * rows.stride(0), _rows(heads * width)
        at = rows.data_ptr(), norm.weight.data_ptr(), out.data_ptr()
        self._add(0, NormJob(0, *at, *sizes, norm.is_above_one, norm.epsilon), rows, norm, out)
        return out

    def rotate_and_append(self, heads: Tensor, turn: Turn | None, pool_layer: Tensor, plan: AttentionPlan) -> Tensor:
        """Turn queries and keys (RoPE, arXiv 2104.09864, by halves), and write keys and values to the pool.

        heads: [T, q_heads + 2 * kv_heads, head_dim], contiguous: queries, which are overwritten, keys and values.
        turn: cosines and sines, each [..., T, head_dim], contiguous; None turns nothing. Products with them are
        rounded. Like the plan they must stay until the end.
        pool_layer: [2, kv_heads, chunks, chunk_tokens, head_dim], contiguous.
        Returns the queries, a view [T, q_heads, head_dim].
        """
        (n_rows, all_heads, width), (_, kv_heads, _, _, head_dim) = heads.shape, pool_layer.shape
        _whole(head_dim // 2)
        if width != head_dim or heads.dtype != pool_layer.dtype:
            raise ValueError(f"heads {_kind(heads)} do not fit a pool {_kind(pool_layer)}")
        q_heads = all_heads - 2 * kv_heads
        job = RotationJob(
            rows=heads.data_ptr(),
            pool=pool_layer.data_ptr(),
            side=2 * pool_layer.stride(0),
            head_side=2 * pool_layer.stride(1),
            n_rows=n_rows,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block=_rows(all_heads * head_dim),
        )

        def renew(turn: Turn | None, plan: AttentionPlan) -> None:
            if plan.n_rows != n_rows:
                raise ValueError(f"heads {_kind(heads)} do not fit {plan.n_rows} rows")
            for part in turn or ():
                if part.shape[-2:] != (n_rows, head_dim) or part.dtype != heads.dtype or not part.is_contiguous():
                    raise ValueError(f"heads {_kind(heads)} are not turned by {_kind(part)}")
            job.cos, job.sin = (turn[0].data_ptr(), turn[1].data_ptr()) if turn else (0, 0)
            job.slots = plan.derived(("slots",), lambda: plan.token_slots.ctypes.data)

        self._renewed(renew, turn, plan)
        self._add(1, job, heads, pool_layer)
        return heads[:, :q_heads]

    def gate(self, rows: Tensor, activation: Activation) -> Tensor:
        """activation(gates) * values (arXiv 2002.05202), the activation rounded first. rows: [T, 2 * width], gates and
        values. Returns [T, width]."""
        n_rows, width = rows.shape[0], _whole(rows.shape[1] // 2)
        out = self._result(n_rows, width)
        job = GateJob(0, rows.data_ptr(), out.data_ptr(), n_rows, width, _rows(width), activation == "gelu_tanh")
        self._add(2, job, rows, out)
        return out

    def add(self, rows: Tensor, to: Tensor) -> Tensor:
        """to += rows, both of one shape. Returns `to`."""
        _whole(rows.shape[-1])
        if rows.shape != to.shape or rows.dtype != to.dtype or not (rows.is_contiguous() and to.is_contiguous()):
            raise ValueError(f"rows {_kind(rows)} cannot be added to {_kind(to)}")
        self._add(3, SumJob(0, rows.data_ptr(), to.data_ptr(), to.numel(), _BLOCK), rows, to)
        return to

    def product(self, compute: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """compute(rows): a stage if it is a `PairProduct`; else what was asked for is computed now, and so is it."""
        if not isinstance(compute, PairProduct):
            self.run()
            out = self._stored(compute(rows))
            self._again.append(lambda *_: out.copy_(compute(rows)))
            return out
        out = self._result(*rows.shape[:-1], compute.columns)
        compute.add_to(self._stages, rows, out, self._threads)
        return out

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
            out = self._result(*query.shape)
            renew = fused.add_to(
                self._stages, query, out, pool_layer, self._threads, scale=scale, window=window, sinks=sinks
            )
            self._renewed(lambda _, plan: renew(plan), None, plan)
            return out
        self.run()
        attend = partial(cpu.attend, query, pool_layer, scale=scale, window=window, softcap=softcap, sinks=sinks)
        attended = self._stored(attend(plan))
        self._again.append(lambda _, plan: attended.copy_(attend(plan)))
        return attended

    def _result(self, *shape: int) -> Tensor:
        self._n_results += 1
        if self._memory is None:
            return torch.empty(shape, dtype=torch.bfloat16)
        return self._memory.result(self._n_results - 1, shape)

    def _stored(self, computed: Tensor) -> Tensor:
        """What no stage computed, where repeats leave it, too. (One that has gaps would be copied by whoever flattens
        it, once.)"""
        return computed.contiguous() if self._memory is None else self._result(*computed.shape).copy_(computed)

    def _add(self, function: int, job: Job, *kept: object) -> None:
        self._stages.add(_functions()[function], job, *kept)

    def _renewed(self, renew: Renew, turn: Turn | None, plan: AttentionPlan) -> None:
        """Do what brings stages up to date, now and before each repeat of them."""
        renew(turn, plan)
        self._again.append(renew)


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
