"""The runner: one step of a model over a batch of sequences, with keys and values in the pool.

Invariant: any mix of prefill and decode rows is one packed forward pass; the plan, not the packing, says who sees whom.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stemcache.engine.attention import StepContext
from stemcache.engine.families import context_length, head_dim
from stemcache.engine.fused import fuse_projections
from stemcache.engine.scheduler import Scheduled
from stemcache.kernels.plan import AttentionPlan, SequenceRows
from stemcache.prefixtree.layout import KVLayout
from stemcache.prefixtree.pool import KVPool


class ModelRunner:
    """A model, and the pool that holds its keys and values."""

    def __init__(self, model: PreTrainedModel, *, pool_bytes: int, chunk_tokens: int) -> None:
        config = model.config
        self._model = model
        if model.device.type == "cpu":
            fuse_projections(model)
        self.device = model.device
        self.vocab_size = int(config.vocab_size)
        self.context_length = context_length(config)
        self.layout = KVLayout(
            layers=int(config.num_hidden_layers),
            kv_heads=int(config.num_key_value_heads),
            head_dim=head_dim(config),
            dtype=str(model.dtype).removeprefix("torch."),
            chunk_tokens=chunk_tokens,
        )
        self.pool = KVPool(self.layout, self.layout.chunks_in(pool_bytes), self.device)
        self.probe()

    def run(self, step: Seq[Scheduled]) -> Tensor:
        """Compute the step's rows: logits float32[n, vocabulary], those of each entry's `logits`, in order."""
        tokens: list[int] = []
        wanted: list[int] = []
        for entry in step:
            wanted += [len(tokens) + position - entry.start for position in entry.logits]
            tokens += entry.sequence.tokens[entry.start : entry.stop]
        return self._forward([_rows(entry) for entry in step], tokens, wanted)

    def probe(self) -> None:
        """Run one token through the model, so that what it asks of its attention is refused now and not in a request.

        Writes to slot 0, which nobody holds yet. Raises ModelLoadError.
        """
        self._forward([SequenceRows(np.zeros(1, dtype=np.int32), 0, 1)], [0], [0])

    @torch.inference_mode()
    def _forward(self, rows: Seq[SequenceRows], tokens: list[int], wanted: list[int]) -> Tensor:
        plan = AttentionPlan.build(rows, chunk_tokens=self.layout.chunk_tokens)
        logits: Tensor = self._model(
            input_ids=torch.tensor([tokens], device=self.device),
            position_ids=torch.from_numpy(plan.positions)[None].to(self.device),
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=self.device),
            step=StepContext(plan, self.pool),
        ).logits
        return logits[0].float()


def _rows(entry: Scheduled) -> SequenceRows:
    assert entry.sequence.lease is not None
    return SequenceRows(np.asarray(entry.sequence.lease.slots, dtype=np.int32), entry.start, entry.stop)
