"""Decoder layers by compiled kernels in place of PyTorch's single operations, in bfloat16 on a CPU.

Invariant: a layer is computed so only if, on the rows of a trial, it gave what transformers' own code gives, up to
rounding. Modules, parameters and their names stay; all that changes is what a layer's call does.

The form that is known is that of Llama, Mistral, Qwen2, Qwen3 and SmolLM3: norm, attention, sum, norm, gated MLP, sum.
Layers of another form stay as they are. What a layer asks of its attention (scale, window) is heard during the trial,
as families keep it under different names.

Rejected: families by name, whose layers a new version of transformers can change under us; replacing norms and MLPs as
modules, since half of the time goes on the way from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from stemcache.engine.attention import AttentionOptions, ListeningStep, StepContext
from stemcache.engine.fused import FusedLinear
from stemcache.kernels.bfloat16_pairs import can_run
from stemcache.kernels.layer_parts import LayerStages

TOLERANCE: Final = 0.02
"""The most by which a trial's results may differ: root mean square of the differences, in parts of that of what the
layer adds to its input. Roundings to bfloat16 come to 0.002 to 0.004."""
_LAYER: Final = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS: Final = ("q_norm", "k_norm")
_MLP: Final = ("gate_proj", "up_proj", "down_proj", "act_fn")


class _OtherFormError(Exception):
    """A layer is not of the form that is known."""


class CompiledLayer:
    """A decoder layer's `forward`. Raises _OtherFormError unless the layer looks like one of the form.

    options: what the layer asks of its attention.
    """

    def __init__(self, layer: Any, options: AttentionOptions) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        head_norms = [name for name in _HEAD_NORMS if hasattr(attention, name)]
        _require_children(layer, *_LAYER)
        _require_children(attention, *_ATTENTION, *head_norms)
        _require_children(mlp, *_MLP)
        self._index, self._options = int(attention.layer_idx), options
        self._rotates = bool(getattr(attention, "use_rope", True))
        self._norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self._head_norms = [_norm(getattr(attention, name)) for name in head_norms]
        self._qkv = _product(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = _product(attention.o_proj)
        self._gate_up = _product(mlp.gate_proj, mlp.up_proj)
        self._down = _product(mlp.down_proj)
        self._head_dim = int(attention.head_dim)
        if options.softcap is not None or options.sinks is not None or not _is_silu(mlp.act_fn):
            raise _OtherFormError

    def __call__(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], step: StepContext, **_: Any
    ) -> Tensor:
        """hidden_states: bfloat16 [1, T, width]. Returns the same shape. Other arguments mean nothing to the form."""
        rows, stages = hidden_states[0].contiguous(), LayerStages()
        attended = self._attend(stages, stages.norm(rows, *self._norms[0]), position_embeddings, step)
        rows = stages.add(rows, to=stages.product(self._out, attended.flatten(1)))
        gates = stages.product(self._gate_up, stages.norm(rows, *self._norms[1]))
        rows = stages.add(rows, to=stages.product(self._down, stages.gate(gates)))
        stages.run()
        return rows[None]

    def _attend(self, stages: LayerStages, rows: Tensor, rotation: tuple[Tensor, Tensor], step: StepContext) -> Tensor:
        pool_layer = step.pool.layer(self._index)
        heads = stages.product(self._qkv, rows).view(len(rows), -1, self._head_dim)
        if self._head_norms:
            kv_heads = pool_layer.shape[1]
            stages.norm(heads[:, : -2 * kv_heads], *self._head_norms[0], in_place=True)
            stages.norm(heads[:, -2 * kv_heads : -kv_heads], *self._head_norms[1], in_place=True)
        cos, sin = rotation
        queries = stages.rotate_and_append(heads, (cos[0], sin[0]) if self._rotates else None, pool_layer, step.plan)
        asked = self._options
        return stages.attend(queries, pool_layer, step.plan, scale=asked.scale, window=asked.window)

    def __deepcopy__(self, _: dict[int, object]) -> CompiledLayer:
        return self  # nothing of it changes

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model that has been prepared for this processor cannot be pickled: save it before")


def _require_children(module: nn.Module, *names: str) -> None:
    if {name for name, _ in module.named_children()} != set(names):
        raise _OtherFormError


def _is_silu(activation: Any) -> bool:
    some = torch.linspace(-8, 8, 33)
    return torch.equal(activation(some), functional.silu(some))


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight.detach(), float(module.variance_epsilon)


def _product(*layers: Any) -> Callable[[Tensor], Tensor]:
    """What computes some linear layers together, in their order."""
    computes = [each.product.compute if isinstance(each, FusedLinear) else each.compute for each in layers]
    if any(each is not computes[0] for each in computes):
        raise _OtherFormError
    return computes[0]


class _Trial:
    """A decoder layer's `forward` meanwhile: transformers' own, with whose results it compares the compiled one's."""

    def __init__(self, layer: nn.Module) -> None:
        self.compiled: CompiledLayer | None = None
        self._layer, self._theirs = layer, layer.forward

    def __call__(self, hidden_states: Tensor, *, step: StepContext, **others: Any) -> Tensor:
        if step.backend != "cpu" or hidden_states.dtype != torch.bfloat16 or not can_run():
            return self._theirs(hidden_states, step=step, **others)  # type: ignore[no-any-return]
        listening = ListeningStep(step.plan, step.pool, step.backend)
        expected: Tensor = self._theirs(hidden_states, step=listening, **others)
        try:
            compiled = CompiledLayer(self._layer, *listening.heard)
            actual = compiled(hidden_states, step=step, **others)
        except (_OtherFormError, AttributeError, TypeError, ValueError):
            return expected
        error, added = (actual - expected).float().norm(), (expected - hidden_states).float().norm()
        self.compiled = compiled if error <= TOLERANCE * added else None
        return expected


@contextmanager
def trying_compiled(model: nn.Module) -> Iterator[None]:
    """Within, a model's decoder layers are run by both codes; afterwards by the compiled one where the two agreed."""
    layers = [layer for layer in model.modules() if hasattr(layer, "self_attn")]
    for layer in layers:
        if isinstance(layer.forward, CompiledLayer):  # of an earlier engine
            del layer.forward
    before = {layer: layer.__dict__.get("forward") for layer in layers}
    trials = {layer: _Trial(layer) for layer in layers}
    for layer, trial in trials.items():
        layer.forward = trial
    try:
        yield
    finally:
        for layer, trial in trials.items():
            del layer.forward
            forward = trial.compiled or before[layer]
            if forward is not None:
                layer.forward = forward
