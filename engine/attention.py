"""The bridge from transformers' attention layers to the kernels: the only file that knows both.

Invariant: every argument that a model passes to its attention is honoured or refused; none is swallowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, TypedDict

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from stemcache.engine.errors import ModelLoadError
from stemcache.kernels.attention import Backend, append_kv, attend
from stemcache.kernels.layer_memory import LayerMemory
from stemcache.kernels.plan import AttentionPlan
from stemcache.prefixtree.pool import KVPool

NAME: Final = "stemcache"

# What models pass on to every attention function and what changes nothing here: the positions are in the plan, the
# cache is the pool, dropout is off in inference, and what to report besides the logits is not attention's business.
_IMMATERIAL = frozenset(
    {"position_ids", "use_cache", "dropout", "output_attentions", "output_hidden_states", "output_router_logits"}
)


class AttentionOptions(TypedDict):
    """What a layer asks of its attention besides rows: arguments of `kernels.attention.attend`."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


@dataclass(frozen=True, slots=True)
class StepContext:
    """What one forward pass hands to its layers through the model's keyword arguments.

    memory: of layers that are compiled.
    """

    plan: AttentionPlan
    pool: KVPool
    backend: Backend
    memory: LayerMemory

    def attend(self, layer: int, query: Tensor, options: AttentionOptions) -> Tensor:
        """Attention of a layer, whose keys are in the pool. query and result: [T, q_heads, head_dim]."""
        return attend(query, self.pool.layer(layer), self.plan, **options, backend=self.backend)


@dataclass(frozen=True, slots=True)
class ListeningStep(StepContext):
    """One that keeps what it was asked for."""

    heard: list[AttentionOptions] = field(default_factory=list)

    def attend(self, layer: int, query: Tensor, options: AttentionOptions) -> Tensor:
        self.heard.append(options)
        return StepContext.attend(self, layer, query, options)  # super() knows no class with slots


def register() -> None:
    """Make the attention known to transformers; idempotent."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """The plan says who sees whom; a mask over packed sequences would be as large as the square of the batch."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step: StepContext,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of the packed rows: query [1, q_heads, T, head_dim], key and value [1, kv_heads, T, head_dim]."""
    refused = sorted(name for name, given in others.items() if given is not None and name not in _IMMATERIAL)
    if refused or attention_mask is not None:
        raise ModelLoadError(
            f"{type(module).__name__} asks its attention for {', '.join(refused) or 'a mask'}, which is not supported, "
            "so the model cannot be served exactly"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    append_kv(step.pool.layer(layer), key[0].transpose(0, 1), value[0].transpose(0, 1), step.plan, backend=step.backend)
    options = AttentionOptions(scale=scaling, window=sliding_window, softcap=softcap, sinks=s_aux)
    return step.attend(layer, query[0].transpose(0, 1), options)[None], None
