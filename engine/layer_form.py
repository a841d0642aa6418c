"""What a decoder layer consists of, whatever its family calls the parts.

Invariant: a form that is read off a layer names all of its children, so that none is left out of what is computed.

Read by the parts' names and by what they do, not by the family's: norm, attention, norm, MLP, a sum after each of the
two, and in Gemma a norm before each sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from stemcache.engine.fused import FusedLinear
from stemcache.engine.packed import PackedLinear
from stemcache.kernels.layer_parts import Activation, Norm

Compute = Callable[[Tensor], Tensor]

_LLAMA: Final = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PHI: Final = _LLAMA | {"resid_attn_dropout", "resid_mlp_dropout"}
_GEMMA: Final = _LLAMA | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_HEAD_NORMS: Final = ("q_norm", "k_norm")
_ACTIVATIONS: Final[dict[Activation, Compute]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


class OtherFormError(Exception):
    """A layer's form is another one."""


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(activation(gates) * values), where gate_up gives gates and values."""

    gate_up: Compute
    activation: Activation
    down: Compute


@dataclass(frozen=True, slots=True)
class LayerForm:
    """A decoder layer's parts.

    before_attention, before_mlp, after_attention, after_mlp: norms, the latter None where there are none.
    head_norms: of queries and of keys, or none. rotates: whether the two are turned.
    qkv: gives queries, keys and values. mlp: its parts, or the whole for another one, such as one of experts.
    """

    index: int
    head_dim: int
    rotates: bool
    before_attention: Norm
    after_attention: Norm | None
    before_mlp: Norm
    after_mlp: Norm | None
    head_norms: tuple[Norm, ...]
    qkv: Compute
    out: Compute
    mlp: GatedMLP | Compute

    @classmethod
    def of(cls, layer: Any) -> LayerForm:
        """Raises OtherFormError."""
        names, attention = _children(layer), layer.self_attn
        if names not in (_LLAMA, _PHI, _GEMMA):
            raise OtherFormError
        has_four = names == _GEMMA
        return cls(
            index=int(attention.layer_idx),
            head_dim=int(attention.head_dim),
            rotates=bool(getattr(attention, "use_rope", True)),
            before_attention=_norm(layer.input_layernorm),
            after_attention=_norm(layer.post_attention_layernorm) if has_four else None,
            before_mlp=_norm(layer.pre_feedforward_layernorm if has_four else layer.post_attention_layernorm),
            after_mlp=_norm(layer.post_feedforward_layernorm) if has_four else None,
            head_norms=tuple(
                _norm(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name)
            ),
            qkv=_qkv(attention),
            out=_product(attention.o_proj),
            mlp=_mlp(layer.mlp),
        )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _norm(module: Any) -> Norm:
    """Llama's, or Gemma's, which call their epsilon differently."""
    is_gemma = hasattr(module, "eps")
    return Norm(module.weight.detach(), float(module.eps if is_gemma else module.variance_epsilon), is_gemma)


def _qkv(attention: Any) -> Compute:
    names = _children(attention).difference(_HEAD_NORMS)
    if names == {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return _product(attention.q_proj, attention.k_proj, attention.v_proj)
    if names == {"qkv_proj", "o_proj"}:
        return _product(attention.qkv_proj)
    raise OtherFormError


def _mlp(mlp: Any) -> GatedMLP | Compute:
    names, activation = _children(mlp), _activation(getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None)))
    if activation and names == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return GatedMLP(_product(mlp.gate_proj, mlp.up_proj), activation, _product(mlp.down_proj))
    if activation and names == {"gate_up_proj", "down_proj", "activation_fn"}:
        return GatedMLP(_product(mlp.gate_up_proj), activation, _product(mlp.down_proj))
    return lambda rows: mlp(rows[None])[0]


def _activation(module: Any) -> Activation | None:
    """Told by what it does, as its class has many names."""
    if module is None:
        return None
    some = torch.linspace(-8, 8, 33)
    return next((name for name, function in _ACTIVATIONS.items() if torch.equal(module(some), function(some))), None)


def _product(*linears: Any) -> Compute:
    """What computes some linear layers together, in their order."""
    if len(linears) == 1 and not isinstance(linears[0], FusedLinear):
        return linears[0].compute if isinstance(linears[0], PackedLinear) else linears[0]
    if not all(isinstance(each, FusedLinear) and each.product is linears[0].product for each in linears):
        raise OtherFormError
    compute: Compute = linears[0].product.compute
    return compute
