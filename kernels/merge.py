"""Merging partial results: each row's outputs over parts of its keys, by their log-sum-exps, into its output.

Invariant: a merge refers only to partials that saw at least one key. With lse = log(sum_i exp(lse_i)) the result is
sum_i exp(lse_i - lse) * out_i (arXiv 2501.01005, section 2.2), which is exact and the same in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Merge:
    """Rows with a like number of partials. rows: int64[n] or None for all in order; partials: int64[n, P] indices into
    the concatenated partials; padding: float[n, P, 1, 1], -inf where a row has fewer than P, or None; aligned: partial
    p of row r is number p * n + r, as in a decode step where every call has all rows in order."""

    rows: Tensor | None
    partials: Tensor
    padding: Tensor | None
    aligned: bool


def plan_merges(owners: NDArray[np.int64], n_rows: int) -> Iterator[Merge]:
    """Group the rows by their number of partials, rounded up to a power of two: padding at most doubles the work, and a
    step has few groups. (One group padded to the largest count would copy a prefill's rows for the sake of a
    decode row's partials.)"""
    by_row = np.argsort(owners, kind="stable")
    by_row = by_row[np.searchsorted(owners[by_row], 0) :]
    counts = np.bincount(owners[by_row], minlength=n_rows)
    assert counts.min() > 0, "a row without any visible key"
    begin = np.cumsum(counts) - counts
    equal = bool((counts == counts[0]).all())
    width = counts if equal else 1 << np.ceil(np.log2(counts)).astype(np.int64)
    for size in np.unique(width).tolist():
        rows = np.flatnonzero(width == size)
        column = np.arange(size)
        used = column < counts[rows, None]
        partials = by_row[begin[rows, None] + np.where(used, column, 0)]
        padding = None
        if not used.all():
            padding = torch.zeros(used.shape).masked_fill_(torch.from_numpy(~used), float("-inf"))[:, :, None, None]
        aligned = len(owners) == partials.size and np.array_equal(
            partials, np.arange(partials.size).reshape(size, -1).T
        )
        index = None if len(rows) == n_rows else torch.from_numpy(rows)
        yield Merge(index, torch.from_numpy(partials), padding, aligned)


def merge_aligned(outputs: Sequence[Tensor], lses: Sequence[Tensor], sink: Tensor | None) -> Tensor:
    """Combine partials that all have all rows in order, one after the other: nothing is gathered. Shapes as in
    `merge_partials`, with K the number of rows."""
    logits = torch.stack([*lses, *([] if sink is None else [sink.expand_as(lses[0])])])
    weights = logits.softmax(dim=0).unsqueeze(-1)
    merged = outputs[0] * weights[0]
    for output, weight in zip(outputs[1:], weights[1:], strict=False):  # a sink has no output
        merged.addcmul_(output, weight)
    return merged.to(outputs[0].dtype)


def merge_partials(output: Tensor, lse: Tensor, merge: Merge, sink: Tensor | None) -> Tensor:
    """Combine each row's partials: weights are the softmax of their log-sum-exps, with a sink as one more that has no
    value. output [K, group, kv_heads, head_dim], lse [K, group, kv_heads], sink [group, kv_heads] -> [n, ...]."""
    n, width = merge.partials.shape
    if width == 1 and sink is None:
        return output.index_select(0, merge.partials[:, 0])
    logits, parts = _partials(lse, merge), _partials(output, merge)
    if merge.padding is not None:
        logits = logits + merge.padding
    if sink is not None:
        logits = torch.cat([logits, sink.expand(n, 1, -1, -1)], dim=1)
    weights = logits.softmax(dim=1)[:, :width].unsqueeze(-1)
    return (parts * weights).sum(dim=1).to(output.dtype)


def _partials(values: Tensor, merge: Merge) -> Tensor:
    """Each row's partials, [n, P, ...], out of [K, ...]."""
    n, width = merge.partials.shape
    return values.index_select(0, merge.partials.flatten()).view(n, width, *values.shape[1:])
