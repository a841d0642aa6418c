"""Products of bfloat16 rows with weights, where the processor multiplies bfloat16 pairs: one compiled kernel.

Invariant: out = hidden . weight^T + bias, summed in float32 and rounded once; a row's result does not depend on the
rows beside it. Products of one weight may run on several threads.

What bounds it: few rows by the memory that the weights are read from, many by the rate of VDPBF16PS (64 products and
sums a cycle and core on a Zen 4). There, on two threads, the products of a layer of SmolLM2-135M's shape read 24 to 25
GB/s for 1 to 8 rows (a sum over memory 28; oneDNN's packed products 14 to 18) and run at 350 to 430 GFLOP/s of 474 from
32 rows on (oneDNN's 310 to 415).
"""

from __future__ import annotations

import ctypes
from typing import Final, NoReturn

import torch
from torch import Tensor

from stemcache.kernels.bfloat16_pairs import is_preferred
from stemcache.kernels.stages import Job, Stages

PANEL: Final = 64
"""Columns (outputs) that lie together in a packed weight: of each pair of inputs, 64 pairs."""
_UNIT: Final = 32
"""Columns that a range is a multiple of."""
_BLOCK_BYTES: Final = 384 << 10
_BLOCK_ROWS: Final = 128
"""Of the input at a time so many bytes, to stay in a core's second cache, but no fewer rows: for each block the weights
are read again. (64 rows of 8,192 inputs take 1.02 times as long, 32 1.05; of 576 inputs 64 to 512 take as long.)"""
_PARTS: Final = 2
"""Column ranges for each thread: the second is for whoever comes first."""


class ProductJob(Job):
    """hidden (bfloat16), out (bfloat16), weights, bias (float32) are addresses. panel_bytes: of a panel of 64 columns,
    0 where the weight is plain. parts: ranges that the columns are cut into. block: rows at a time."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("counters", "hidden", "n_rows", "out", "weights", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "columns", "panel_bytes", "parts", "block")),
    ]


class PairProduct:
    """The product with one weight. Made by `packed` or `plain`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, columns: int, inputs: int, panel_bytes: int) -> None:
        from stemcache.kernels.product_kernel import compiled

        self.columns, self.inputs = columns, inputs
        self._kept = weight, torch.zeros(columns) if bias is None else bias.detach().float()
        self._addresses = tuple(each.data_ptr() for each in self._kept)
        self._panel_bytes = panel_bytes
        self._block = max(_BLOCK_ROWS, _BLOCK_BYTES // (2 * inputs) // 4 * 4)
        self._function = compiled().address

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., inputs] -> [..., columns], both bfloat16. Raises TypeError for another shape or dtype."""
        threads, stages = torch.get_num_threads(), Stages()
        out = hidden.new_empty((*hidden.shape[:-1], self.columns))
        self.add_to(stages, hidden.contiguous(), out, threads)
        stages.run(threads)
        return out

    def add_to(self, stages: Stages, hidden: Tensor, out: Tensor, threads: int) -> None:
        """Write down what the call does, for so many threads. hidden, out: [..., inputs] and [..., columns],
        contiguous. Raises TypeError for another shape or dtype of `hidden`."""
        if hidden.dtype != torch.bfloat16 or hidden.shape[-1] != self.inputs:
            wanted = f"a product of {self.inputs} bfloat16 inputs"
            raise TypeError(f"{wanted} was given {str(hidden.dtype).removeprefix('torch.')} {list(hidden.shape)}")
        assert hidden.is_contiguous() and out.is_contiguous()  # noqa: PT018
        n_rows, parts = hidden.numel() // self.inputs, min(self.columns // _UNIT, _PARTS * threads)
        size = self.inputs, self.columns, self._panel_bytes, parts, self._block
        job = ProductJob(0, hidden.data_ptr(), n_rows, out.data_ptr(), *self._addresses, *size)
        stages.add(self._function, job, self, hidden, out)

    def __deepcopy__(self, _: dict[int, object]) -> PairProduct:
        return self  # nothing of it changes, and a copy's addresses would be those of the original's memory

    def __reduce__(self) -> NoReturn:
        raise TypeError("a product that has been prepared for this processor cannot be pickled: save the model before")


def can_pack(weight: Tensor) -> bool:
    """Whether `packed` is there for a weight `[columns, inputs]`, and worth it."""
    columns, inputs = weight.shape
    return _is_for_pairs(weight) and columns % _UNIT == 0 and inputs % 2 == 0


def packed(weight: Tensor, bias: Tensor | None) -> PairProduct:
    """The product with a copy of the weight, `[columns / 64, inputs / 2, 64]` pairs."""
    columns, inputs = weight.shape
    pairs = weight.detach().contiguous().view(torch.int32)
    if columns % PANEL:
        pairs = torch.nn.functional.pad(pairs, (0, 0, 0, PANEL - columns % PANEL))
    panels = pairs.view(-1, PANEL, inputs // 2).transpose(1, 2).contiguous()
    return PairProduct(panels, bias, columns=columns, inputs=inputs, panel_bytes=2 * PANEL * inputs)


FEW_ROWS: Final = 64
"""Up to which `plain` is worth it: it takes 0.9 of the time of PyTorch's product then, and with 96 as long."""


def can_read(weight: Tensor) -> bool:
    """Whether `plain` is there for a weight `[columns, inputs]`, and worth it."""
    columns, inputs = weight.shape
    return _is_for_pairs(weight) and weight.is_contiguous() and columns % _UNIT == 0 and inputs % 32 == 0


def plain(weight: Tensor, bias: Tensor | None) -> PairProduct:
    """The product with the weight as it is, which must stay where it is: for up to `FEW_ROWS` rows."""
    columns, inputs = weight.shape
    return PairProduct(weight.detach(), bias, columns=columns, inputs=inputs, panel_bytes=0)


def _is_for_pairs(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and is_preferred()
