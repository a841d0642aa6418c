"""Calls of the CPU's flash kernel: one of them, and all that a layer takes.

Invariant: a call says which rows see which keys; it knows no values, so every layer of a step makes the same calls.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stemcache.kernels.merge import Merge


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the kernel: `batch` groups of `n_rows` rows, each against its own keys.

    rows: int64[batch * n_rows] rows of the step, or None for all rows in order.
    chunks: int64[batch * n] chunks to gather, or None for a view of the pool.
    start, stop: tokens of the view, or of each group's gathered keys.
    splits: equal parts of a view's keys, each giving its own partial.
    packed: the query heads of a KV head are packed into the rows; otherwise every head is called by itself.
    doubled: the kernel is given its only row twice, as two take it a fraction of the time of one.
    causal: the last keys are the rows' own, one each; all rows see those before them.
    mask: additive, broadcastable to [batch, 1, kernel rows, keys], or None where all is visible.
    """

    rows: Tensor | None
    batch: int
    n_rows: int
    chunks: Tensor | None
    start: int
    stop: int
    splits: int
    packed: bool
    doubled: bool
    causal: bool
    mask: Tensor | None

    @property
    def padding(self) -> int:
        """Rows of zeros before the others, so that a causal call has as many rows as keys."""
        return self.stop - self.start - self.n_rows if self.causal else 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """A layer's calls, and how their partial results are merged."""

    calls: tuple[Call, ...]
    merges: tuple[Merge, ...]

    @property
    def direct(self) -> bool:
        """One call gives every row's only partial, in order: nothing to merge."""
        return len(self.calls) == 1 and self.calls[0].rows is None and self.calls[0].splits == 1
