"""Weights in the layout that a CPU's bfloat16 instructions read, in place of their own.

Invariant: a packed layer gives the product of the same numbers, and its plain weight is let go: nothing is held twice.

A plain bfloat16 weight is brought into that layout again for every product: the products of a layer of SmolLM2-135M's
shape take 1.2 to 1.3 times as long for 1 to 32 rows, 1.5 times for 64, 1.3 for 256, 1.15 for 544, and as long from
1,088 on (one thread of a Xeon with AMX, processor time, medians of interleaved calls). The operations are oneDNN's,
which torch's compiler uses for frozen weights. They are no public interface: where one is missing, all stays as it is.
Rejected: packing for one row, the hint for decoding, with which prefills take half as long again; packing float32,
which was as often slower as faster; and the vocabulary, which gains little and is the embedding's table too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stemcache.engine.fused import FusedLinear

HINTED_ROWS: Final = 1024
"""Rows for which oneDNN chooses the layout: with 64 all sizes take a hundredth longer."""


class PackedLinear(nn.Module):
    """A linear layer without a plain weight. Its bias is a parameter, or None."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._compute = _packed(linear.weight, linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._compute(hidden)


def can_pack() -> bool:
    """Whether this torch, on this CPU, computes with packed bfloat16 weights: by trying it."""
    weight = torch.eye(32, dtype=torch.bfloat16)
    try:
        supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return supported and torch.equal(_packed(weight, None)(weight), weight)
    except (AttributeError, RuntimeError):  # there is no such operation, or it is not for this processor
        return False


@torch.no_grad()
def pack_weights(model: PreTrainedModel) -> int:
    """Pack the linear layers of a bfloat16 model in place, fused ones as one; returns how many products are packed."""
    if not can_pack():
        return 0
    packed = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FusedLinear):
                packed += _pack_fused(child)
            elif _is_plain(child) and child is not model.get_output_embeddings():
                setattr(module, name, PackedLinear(child))
                packed += 1
    return packed


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.weight.dtype == torch.bfloat16


def _pack_fused(linear: FusedLinear) -> int:
    """Pack the product that a layer shares, unless a sibling's turn came before; the layer's own view goes."""
    if linear.weight is None or linear.weight.dtype != torch.bfloat16:
        return 0
    product = linear.product
    linear.register_parameter("weight", None)
    if product.weight is None:
        return 0
    product.compute, product.weight = _packed(product.weight, product.bias), None
    return 1


def _packed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    layout = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), HINTED_ROWS)
    return partial(_product, layout, None if bias is None else bias.detach())


def _product(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return product
