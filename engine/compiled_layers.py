"""Decoder layers by compiled kernels in place of PyTorch's single operations, in bfloat16 on a CPU.

Invariant: a layer is computed so only if, on the rows of a trial, it gave what transformers' own code gives, up to
rounding. Modules, parameters and their names stay; all that changes is what a layer's call does.

What a layer consists of is read off its parts (`layer_form`); what it asks of its attention (scale, window) is heard
during the trial, as families keep it under different names. Layers of a form that is not known stay as they are.

Rejected: families by name, whose layers a new version of transformers can change under us; a call for each part, with
which a step of one sequence took 0.83 of the time where one for a layer took 0.73.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn

from stemcache.engine.attention import AttentionOptions, ListeningStep, StepContext
from stemcache.engine.layer_form import GatedMLP, LayerForm, OtherFormError
from stemcache.kernels.bfloat16_pairs import can_run
from stemcache.kernels.layer_memory import MOST_ROWS
from stemcache.kernels.layer_parts import LayerStages, Norm, Turn

TOLERANCE: Final = 0.005
"""The most by which a trial's results may differ: root mean square of the differences, in parts of that of what the
layer adds to its input. Roundings that fall on the other side come to 0.0003 at most in the families' random models."""


class CompiledLayer:
    """A decoder layer's `forward`. options: what it asks of its attention."""

    def __init__(self, form: LayerForm, options: AttentionOptions) -> None:
        self._form, self._options = form, options

    def __call__(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], step: StepContext, **_: Any
    ) -> Tensor:
        """hidden_states: bfloat16 [1, T, width]. Returns the same shape. Other arguments mean nothing to the form."""
        rows, n_rows = hidden_states[0], hidden_states.shape[1]  # a tensor's len() takes a function in Python
        turn = position_embeddings if self._form.rotates else None
        written = step.memory.written(self, n_rows)
        if written is not None:
            return written.repeat(rows, turn, step.plan)[None]
        if n_rows > MOST_ROWS:
            return self._write(LayerStages(), rows, turn, step)[None]
        stages = LayerStages(step.memory)
        result = self._write(stages, rows, turn, step)
        step.memory.keep(self, stages, n_rows)
        return result[None]

    def _write(self, stages: LayerStages, rows: Tensor, turn: Turn | None, step: StepContext) -> Tensor:
        form, rows = self._form, stages.begin(rows)
        attended = self._attend(stages, stages.norm(rows, form.before_attention), turn, step)
        rows = _sum(stages, rows, stages.product(form.out, attended.flatten(1)), form.after_attention)
        added, mlp = stages.norm(rows, form.before_mlp), form.mlp
        if isinstance(mlp, GatedMLP):
            added = stages.product(mlp.down, stages.gate(stages.product(mlp.gate_up, added), mlp.activation))
        else:
            added = stages.product(mlp, added)
        return stages.end(_sum(stages, rows, added, form.after_mlp))

    def _attend(self, stages: LayerStages, rows: Tensor, turn: Turn | None, step: StepContext) -> Tensor:
        form, pool_layer = self._form, step.pool.layer(self._form.index)
        heads = stages.product(form.qkv, rows).view(len(rows), -1, form.head_dim)
        if form.head_norms:
            of_queries, of_keys = form.head_norms
            kv_heads = pool_layer.shape[1]
            stages.norm(heads[:, : -2 * kv_heads], of_queries, in_place=True)
            stages.norm(heads[:, -2 * kv_heads : -kv_heads], of_keys, in_place=True)
        queries = stages.rotate_and_append(heads, turn, pool_layer, step.plan)
        return stages.attend(queries, pool_layer, step.plan, **self._options)

    def __deepcopy__(self, _: dict[int, object]) -> CompiledLayer:
        return self  # nothing of it changes

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model that has been prepared for this processor cannot be pickled: save it before")


def _sum(stages: LayerStages, rows: Tensor, added: Tensor, norm: Norm | None) -> Tensor:
    """rows + added, or its norm. `added` is overwritten."""
    return stages.add(rows, to=added if norm is None else stages.norm(added, norm, in_place=True))


class _Trial:
    """A decoder layer's `forward` meanwhile: transformers' own, with whose results it compares the compiled one's."""

    def __init__(self, layer: nn.Module) -> None:
        self.compiled: CompiledLayer | None = None
        self._layer, self._theirs = layer, layer.forward

    def __call__(self, hidden_states: Tensor, *, step: StepContext, **others: Any) -> Tensor:
        if step.backend != "cpu" or hidden_states.dtype != torch.bfloat16 or not can_run():
            return self._theirs(hidden_states, step=step, **others)  # type: ignore[no-any-return]
        listening = ListeningStep(step.plan, step.pool, step.backend, step.memory)
        expected: Tensor = self._theirs(hidden_states, step=listening, **others)
        try:
            compiled = CompiledLayer(LayerForm.of(self._layer), *listening.heard)
            actual = compiled(hidden_states, step=step, **others)
        except (OtherFormError, AttributeError, TypeError, ValueError, RuntimeError):
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
