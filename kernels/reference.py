"""The oracle: attention one sequence at a time over all of its gathered chunks, with a full mask.

Invariant: uses nothing of the plan but the sequences, so that a fault in the work items cannot hide here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stemcache.kernels.plan import AttentionPlan, SequenceRows


def attend(
    query: Tensor,
    pool_layer: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in float64, rounded once to the query's dtype. Shapes as in `kernels.attention.attend`."""
    outputs = []
    row = 0
    for sequence in plan.sequences:
        rows = sequence.stop - sequence.start
        outputs.append(_one(query[row : row + rows].double(), pool_layer, sequence, scale, window, softcap, sinks))
        row += rows
    return torch.cat(outputs).to(query.dtype)


def _one(
    query: Tensor,
    pool_layer: Tensor,
    sequence: SequenceRows,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    chunks = torch.as_tensor(sequence.chunks, dtype=torch.int64, device=query.device)
    gathered = pool_layer.index_select(2, chunks).double().flatten(2, 3)[:, :, : sequence.stop]
    key, value = gathered.repeat_interleave(query.shape[1] // pool_layer.shape[1], dim=1)  # [q_heads, stop, head_dim]
    scores = query.transpose(0, 1) @ key.transpose(1, 2) * scale  # [q_heads, rows, stop]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(sequence.start, sequence.stop, device=query.device)[:, None]
    key_position = torch.arange(sequence.stop, device=query.device)
    visible = key_position <= position
    if window is not None:
        visible &= key_position > position - window
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        extra = sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = scores.softmax(dim=-1)[..., : sequence.stop]
    output: Tensor = weights @ value
    return output.transpose(0, 1)
