"""Projections of the same input as one matrix product: queries, keys and values; gate and up of an MLP.

Invariant: a fused model computes what it computed before, and its parameters have their names, shapes and values; they
lie next to each other in memory, and nothing is held twice.

On a CPU a product with a few rows costs about as much to begin as to compute: with one sequence of SmolLM2-135M's shape
in bfloat16 the 211 products of a step take 49 ms, the 121 fused ones 40 (two cores; benchmarks/decode.py). The layers
themselves know nothing of it; where `engine.compiled_layers` takes their place, it asks for the product at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

_SIBLINGS: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Product:
    """The product that some projections share. It is computed when the first is asked for, and kept until the last.

    weight: [sum of sizes, in], None once something else computes the product. bias: [sum of sizes] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
        self.weight: Tensor | None = weight
        self.bias = bias
        self.compute: Callable[[Tensor], Tensor] = partial(functional.linear, weight=weight, bias=bias)
        self._sizes = list(sizes)
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, index: int, hidden: Tensor) -> Tensor:
        """One projection of `hidden`, a view of the product [..., sum of sizes]."""
        if hidden is not self._input or index not in self._parts:
            parts = torch.split(self.compute(hidden), self._sizes, dim=-1)
            self._input, self._parts = hidden, dict(enumerate(parts))
        part = self._parts.pop(index)
        if not self._parts:
            self._input = None  # a long prefill's are large
        return part


class FusedLinear(nn.Module):
    """A linear layer that is computed together with its siblings. weight and bias are views of theirs together; the
    weight is None once the product has been packed."""

    def __init__(self, product: Product, index: int, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.product, self._index = product, index
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.product.part(self._index, hidden)


def fuse_projections(model: nn.Module) -> int:
    """Fuse what can be fused, in place; returns how many products it saves a step."""
    saved = 0
    for module in list(model.modules()):
        for names in _SIBLINGS:
            linears = [each for name in names if type(each := getattr(module, name, None)) is nn.Linear]
            if len(linears) == len(names) and _alike(linears):
                for name, fused in zip(names, _fused(linears), strict=True):
                    setattr(module, name, fused)
                saved += len(names) - 1
    return saved


def _alike(linears: Sequence[nn.Linear]) -> bool:
    """Whether their weights make one matrix, and their biases one vector or none."""
    first = linears[0]
    return all(
        each.in_features == first.in_features
        and each.weight.dtype == first.weight.dtype
        and (each.bias is None) == (first.bias is None)
        for each in linears
    )


@torch.no_grad()
def _fused(linears: Sequence[nn.Linear]) -> Iterator[FusedLinear]:
    weight = torch.cat(tuple(each.weight for each in linears))
    biases = tuple(each.bias for each in linears if each.bias is not None)
    bias = torch.cat(biases) if biases else None
    sizes = [each.out_features for each in linears]
    product, start = Product(weight, bias, sizes), 0
    for index, size in enumerate(sizes):
        part = slice(start, start + size)
        yield FusedLinear(product, index, weight[part], None if bias is None else bias[part])
        start += size
