"""The runner: one step of a model over a batch of sequences, with keys and values in the pool.

Invariant: any mix of prefill and decode rows is one packed forward pass; the plan, not the packing, says who sees whom.
What is returned has been computed, also on a device that works behind the host's back.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stemcache.engine.attention import StepContext
from stemcache.engine.compiled_layers import trying_compiled
from stemcache.engine.decode_graphs import DecodeGraphs
from stemcache.engine.families import context_length, head_dim
from stemcache.engine.freed_memory import give_back_freed_memory
from stemcache.engine.fused import fuse_projections
from stemcache.engine.movable import inverse_frequencies
from stemcache.engine.packed import pack_weights
from stemcache.engine.scheduler import Scheduled
from stemcache.kernels.attention import Backend, backend_for, triton_backend
from stemcache.kernels.layer_memory import LayerMemory
from stemcache.kernels.plan import AttentionPlan, SequenceRows
from stemcache.kernels.triton_metadata import gpu_sharing
from stemcache.prefixtree.layout import KVLayout
from stemcache.prefixtree.pool import KVPool

NEW_ROW_COUNTS = 64
"""Steps of so many different sizes, and what oneDNN left of making kernels for them (up to 200 MB) is given back."""

PROBED = 8
"""Tokens of a probe, at most those of the smallest chunk."""


class ModelRunner:
    """A model, and the pool that holds its keys and values.

    max_running: sequences that a step may have, at most. backend: of the attention; "auto" goes by the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pool_bytes: int,
        chunk_tokens: int,
        max_running: int,
        backend: Backend = "auto",
    ) -> None:
        self.config = config = model.config
        self._model = model
        self._is_packed = False
        self._row_counts: set[int] = set()  # of the steps since memory was given back
        if model.device.type == "cpu":
            fuse_projections(model)
            self._is_packed = pack_weights(model) > 0
        self.device = model.device
        self.vocab_size = int(config.vocab_size)
        self.context_length = context_length(config)
        self.inverse_frequencies = inverse_frequencies(model)
        self.layout = KVLayout(
            layers=int(config.num_hidden_layers),
            kv_heads=int(config.num_key_value_heads),
            head_dim=head_dim(config),
            dtype=str(model.dtype).removeprefix("torch."),
            chunk_tokens=chunk_tokens,
        )
        self.pool = KVPool(self.layout, self.layout.chunks_in(pool_bytes), self.device)
        self._backend = backend_for(self.device, backend)
        self._memory = LayerMemory()
        on_triton = self._backend == "triton"
        self._sharing = gpu_sharing(group=self._q_heads // self.layout.kv_heads) if on_triton else None
        self.graphs = self._make_graphs(max_running) if on_triton else None
        with trying_compiled(model):
            self.probe()
        if self.graphs is not None:
            self.graphs.capture()

    def run(self, step: Seq[Scheduled]) -> Tensor:
        """Compute the step's rows: logits float32[n, vocabulary], those of each entry's `logits`, in order.

        The next run may overwrite them.
        """
        tokens: list[int] = []
        wanted: list[int] = []
        for entry in step:
            for run in entry.runs:
                tokens += entry.sequence.tokens[run.start : run.stop]
            wanted += [len(tokens) + position - entry.stop for position in entry.logits]
        rows = [rows for entry in step for rows in _rows(entry)]
        if self.graphs is not None and len(rows) == len(tokens) == len(wanted):
            logits = self.graphs.run(rows, tokens)
            if logits is not None:
                return logits
        return self._run(rows, tokens, wanted)

    def probe(self) -> None:
        """Run some tokens through the model, so that what it asks of its attention is refused now, not in a request.

        Writes to slot 0, which nobody holds yet. Raises ModelLoadError.
        """
        tokens = [self.vocab_size * i // PROBED for i in range(PROBED)]
        self._run([SequenceRows(np.zeros(1, dtype=np.int32), 0, PROBED)], tokens, [0])

    def read_alone(self, slots: Seq[int], positions: Seq[int]) -> None:
        """Read one token at several positions, each time as if nothing stood before it.

        Its keys and values go to the beginnings of `slots`.
        """
        rows = [SequenceRows(np.array([slot], dtype=np.int32), 0, 1) for slot in slots]
        self._run(rows, [0] * len(rows), [0], torch.tensor(positions))

    def _run(
        self, rows: Seq[SequenceRows], tokens: list[int], wanted: list[int], positions: Tensor | None = None
    ) -> Tensor:
        """positions: int64[T], what keys are rotated by; by default where they lie in their sequences."""
        plan = self._plan(rows)
        positions = torch.from_numpy(plan.positions) if positions is None else positions
        logits = self._forward(
            torch.tensor([tokens], device=self.device),
            positions[None].to(self.device),
            plan,
            torch.tensor(wanted, dtype=torch.long, device=self.device),
        )
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if self._is_packed:
            self._row_counts.add(len(tokens))
            if len(self._row_counts) == NEW_ROW_COUNTS:
                self._row_counts.clear()
                give_back_freed_memory()
        return logits

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, positions: Tensor, plan: AttentionPlan, wanted: Tensor | int = 0) -> Tensor:
        """tokens, positions: int64[1, T]. wanted: rows whose logits are returned, int64[n]; all of them by default."""
        logits: Tensor = self._model(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=wanted,
            step=StepContext(plan, self.pool, self._backend, self._memory),
        ).logits
        return logits[0].float()

    def _plan(self, rows: Seq[SequenceRows]) -> AttentionPlan:
        return AttentionPlan.build(rows, chunk_tokens=self.layout.chunk_tokens, sharing=self._sharing)

    def _make_graphs(self, max_running: int) -> DecodeGraphs:
        layout, size = self.layout, self.layout.chunk_tokens
        key = triton_backend().step_key(
            self._q_heads, layout.kv_heads, layout.head_dim, self.pool.tensor.dtype, self.device
        )
        max_chunks = min(self.pool.n_chunks, -(-self.context_length // size))
        return DecodeGraphs(self._forward, self._plan, key, max_rows=max_running, max_chunks=max_chunks)

    @property
    def _q_heads(self) -> int:
        return int(self.config.num_attention_heads)


def _rows(entry: Scheduled) -> list[SequenceRows]:
    """The entry's runs. A layer appends the keys of all rows before any of them attends, so later runs see earlier."""
    assert entry.sequence.lease is not None
    slots = np.asarray(entry.sequence.lease.slots, dtype=np.int32)
    return [SequenceRows(slots, run.start, run.stop) for run in entry.runs]
