"""Weights in the layout that a CPU's instructions read, in place of their own.

Invariant: a packed layer gives the product of the same numbers, and its plain weight is let go: nothing is held twice.
A vocabulary that is also the table of embeddings keeps its plain one.

Where `kernels.products` runs, which is on processors with AVX512_BF16 and without AMX, all products in bfloat16 are its
own, and a vocabulary that stays plain is read where it lies for few rows. Elsewhere they are oneDNN's, by operations
that torch's compiler uses for frozen weights. Those are no public interface: where one is missing, all stays as it is.

A plain bfloat16 weight is brought into oneDNN's layout again for every product: the products of a layer of
SmolLM2-135M's shape take 1.2 to 1.3 times as long for 1 to 32 rows, 1.5 times for 64, 1.3 for 256, 1.15 for 544, and as
long from 1,088 on (one thread of a Xeon with AMX, processor time, medians of interleaved calls).

float32 is packed on AMD's processors only: torch's own products are MKL's, which has its best kernels for Intel's. On
a Zen 4 they take 1.2 to 1.9 times as long for up to 128 rows, 1.2 to 1.4 beyond; on the Xeon packed ones were as often
slower as faster. There a vocabulary that stays plain goes through oneDNN too: 0.4 to 0.6 of MKL's time. (In bfloat16
torch's own product is oneDNN's.)

Rejected: packing for one row, the hint for decoding, with which prefills take half as long again; timing both at the
start, after which two runs of one machine could round differently; and a packed copy of a vocabulary that is the
embedding's table too: a fifth more memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from stemcache.engine.fused import FusedLinear
from stemcache.kernels import products

HINTED_ROWS: Final = 1024
"""Rows for which oneDNN chooses the layout: with 64 all sizes take a hundredth longer."""
_PROCESSORS: Final = Path("/proc/cpuinfo")


class PackedLinear(nn.Module):
    """A linear layer by the compiled kernel or by oneDNN. Its bias is a parameter, or None; its weight None, or plain
    (`shared`, with others)."""

    def __init__(self, linear: nn.Linear, *, shared: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight if shared else None
        self.bias = linear.bias
        self.compute = (_shared if shared else _packed)(linear.weight, linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.compute(hidden)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch, on this CPU, computes with packed weights of that dtype: by trying it."""
    weight = torch.eye(32, dtype=dtype)
    try:
        supported = dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return supported and torch.equal(_packed(weight, None)(weight), weight)
    except (AttributeError, RuntimeError):  # there is no such operation, or it is not for this processor
        return False


def gains_by_packing(dtype: torch.dtype) -> bool:
    """Whether products of that dtype are faster from packed weights, on this processor."""
    return dtype == torch.bfloat16 or (dtype == torch.float32 and is_amd())


def is_amd() -> bool:
    """Whether the processor is AMD's, as far as the system tells."""
    try:
        return "AuthenticAMD" in _PROCESSORS.read_text()
    except OSError:
        return False


@torch.no_grad()
def pack_weights(model: PreTrainedModel) -> int:
    """Pack a model's linear layers in place, fused ones as one; returns how many products are packed: none where that
    gains nothing."""
    dtype, table = model.dtype, model.get_input_embeddings().weight
    if not gains_by_packing(dtype) or not can_pack(dtype):
        return 0
    packed = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FusedLinear):
                packed += _pack_fused(child, dtype)
            elif _is_plain_linear(child, dtype):
                shared = child.weight is table
                if not shared or dtype == torch.float32 or products.can_read(child.weight):
                    setattr(module, name, PackedLinear(child, shared=shared))
                    packed += 1
    return packed


def _is_plain_linear(module: nn.Module, dtype: torch.dtype) -> bool:
    return type(module) is nn.Linear and module.weight.dtype == dtype


def _pack_fused(linear: FusedLinear, dtype: torch.dtype) -> int:
    """Pack the product that a layer shares, unless a sibling's turn came before; the layer's own view goes."""
    if linear.weight is None or linear.weight.dtype != dtype:
        return 0
    product = linear.product
    linear.register_parameter("weight", None)
    if product.weight is None:
        return 0
    product.compute, product.weight = _packed(product.weight, product.bias), None
    return 1


def _packed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    if products.can_pack(weight):
        return products.packed(weight, bias)
    return _by_onednn(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), HINTED_ROWS), bias)


def _shared(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """With a weight that stays plain."""
    if not products.can_read(weight):
        return _by_onednn(weight, bias)
    few, many = products.plain(weight, bias), partial(functional.linear, weight=weight, bias=bias)
    return lambda hidden: (few if hidden.numel() <= products.FEW_ROWS * few.inputs else many)(hidden)


def _by_onednn(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return partial(_product, weight.detach(), None if bias is None else bias.detach())


def _product(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return product
