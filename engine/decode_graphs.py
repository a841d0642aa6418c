"""Decode steps as replays of captured CUDA graphs: a step then costs the host its plan, two copies and one launch.

Invariant: the graph of n rows computes any step of at most n rows from the fixed buffers alone. Rows beyond the step's
are computed from whatever lies there: they write no keys, no row of the step sees them, and they are cut off.

Without a GPU the same buffers go through the plain forward pass: that is how tests run all of this but the capture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stemcache.kernels.plan import AttentionPlan, SequenceRows
from stemcache.kernels.triton_metadata import HEADER, PIECE_WORDS, Geometry, StepMetadata
from stemcache.kernels.triton_step import StepBuffers, StepKey

log = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor, AttentionPlan], Tensor]
"""Token ids int64[1, n], positions int64[1, n] and a plan of n rows: logits float32[n, vocabulary]."""
Planner = Callable[[Sequence[SequenceRows]], AttentionPlan]


class DecodeGraphs:
    """One graph a batch size, all over the same buffers. Belongs to one thread.

    key: of the layers' attention. planner: how the runner plans a step. max_rows: sequences that decode at once, at
    most. max_chunks: of one sequence.

    Attributes: replayed, planned_ahead: steps since the start, and those of them whose plan was made during the last.
    """

    def __init__(self, forward: Forward, planner: Planner, key: StepKey, *, max_rows: int, max_chunks: int) -> None:
        self._forward, self._planner = forward, planner
        self._on_gpu = key.device.type == "cuda"
        n_words, n_parts = _room(key.geometry, max_rows, max_chunks)
        self._buffers = StepBuffers(key, n_rows=max_rows, n_words=n_words, n_parts=n_parts)
        self._inputs = torch.zeros(2, max_rows, dtype=torch.long, device=key.device)
        self._staging = torch.zeros(2, max_rows, dtype=torch.long, pin_memory=self._on_gpu)
        self._replays: dict[int, Callable[[], Tensor]] = {}
        self._ahead: AttentionPlan | None = None
        self.replayed = 0
        self.planned_ahead = 0

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture all sizes, the largest first: the smaller ones then find room in its memory.

        Writes to slot 0, which nobody may hold yet, and nothing else of this process may use the device meanwhile.
        A model whose pass cannot be captured, such as one that asks the device how to go on, runs without graphs.
        """
        memory = torch.cuda.graph_pool_handle() if self._on_gpu else None
        for size in reversed(batch_sizes(self._buffers.n_rows)):
            plan = self._planner([SequenceRows(np.zeros(1, dtype=np.int32), 0, 1)] * size)
            self._buffers.load(plan)
            replay = self._pass(plan, size)
            if memory is not None:
                try:
                    replay = _captured(replay, memory)
                except RuntimeError as error:
                    log.warning("decode steps run without CUDA graphs, as this model cannot be captured: %s", error)
                    self._replays.clear()
                    return
            self._replays[size] = replay

    @torch.inference_mode()
    def run(self, rows: Sequence[SequenceRows], tokens: Sequence[int]) -> Tensor | None:
        """Logits float32[n, vocabulary] for one new token of each of n sequences, complete when it returns.

        The next run overwrites them. None where the step fits no graph; then nothing has been computed.
        """
        n = len(tokens)
        size = min((size for size in self._replays if size >= n), default=None)
        if size is None:
            return None
        plan = self._plan(rows)
        metadata = StepMetadata.build(plan, self._buffers.key.geometry)
        if not self._buffers.fits(metadata):
            return None
        self._buffers.load(plan, metadata)
        self._staging[:, :n] = torch.tensor([list(tokens), plan.positions.tolist()])
        self._inputs[:, :n].copy_(self._staging[:, :n], non_blocking=True)
        logits = self._replays[size]()[:n]
        self._ahead = self._plan_next(plan)  # while the device computes
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        self.replayed += 1
        return logits

    def _pass(self, plan: AttentionPlan, size: int) -> Callable[[], Tensor]:
        tokens, positions = self._inputs[:1, :size], self._inputs[1:, :size]
        return lambda: self._forward(tokens, positions, plan)

    def _plan(self, rows: Sequence[SequenceRows]) -> AttentionPlan:
        """The step's plan: the one that was made ahead if this is the step that was foreseen."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or not _same_step(ahead, rows):
            return self._planner(rows)
        self.planned_ahead += 1
        return ahead

    def _plan_next(self, plan: AttentionPlan) -> AttentionPlan | None:
        """The plan of the same sequences' next tokens; None where one of them first needs another chunk."""
        if any(each.stop >= len(each.chunks) * plan.chunk_tokens for each in plan.sequences):
            return None
        return self._planner([SequenceRows(each.chunks, each.stop, each.stop + 1) for each in plan.sequences])


def batch_sizes(max_rows: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ..., max_rows: a step computes at most half as many rows again as it has."""
    sizes = {max_rows}
    size = 1
    while size < max_rows:
        sizes |= {size, min(max_rows, size + size // 2)}
        size *= 2
    return sorted(sizes)


def _room(geometry: Geometry, max_rows: int, max_chunks: int) -> tuple[int, int]:
    """Words and partials of the buffers. A step that needs more, as a very deep tree's may, runs without a graph.

    A forest of n sequences has at most 2 n - 1 nodes at which sequences part or end, so as many items. These are cut
    into pieces for all programs together and one more each (see `triton_metadata`); rows may be in four items each.
    """
    items = 2 * max_rows
    pieces = items + geometry.programs
    row_entries = 4 * max_rows
    words = HEADER + pieces * PIECE_WORDS + 2 * row_entries + max_rows * (max_chunks + 2) + 2
    tile_rows = min(max_rows, geometry.large_rows)
    parts = row_entries + tile_rows * (2 + geometry.programs // (geometry.kv_heads * geometry.head_blocks))
    return words + parts, parts


def _same_step(plan: AttentionPlan, rows: Sequence[SequenceRows]) -> bool:
    """Whether the plan is that of these rows: the same positions of sequences in the same chunks."""
    if len(plan.sequences) != len(rows):
        return False
    for known, asked in zip(plan.sequences, rows, strict=True):
        needed = -(-asked.stop // plan.chunk_tokens)
        same = (known.start, known.stop) == (asked.start, asked.stop)
        if not same or not np.array_equal(known.chunks[:needed], asked.chunks[:needed]):
            return False
    return True


def _captured(forward: Callable[[], Tensor], memory: Any) -> Callable[[], Tensor]:
    """The pass as a graph, after running it once: kernels are compiled and libraries take their workspaces then.

    memory: a handle of torch's graph pools.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        logits = forward()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
