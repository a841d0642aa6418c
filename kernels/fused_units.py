"""How the fused CPU kernel runs a plan: pieces of work for any thread to take, and rows whose results are merged.

Invariant: the units cover every visible (row, key) pair once. A row with one unit is written by it; a row with several
has one partial result from each, and `merged_rows` names it with them.

A unit is read for all rows of a block and all query heads of a KV head at once. It is cut so that each of `threads` has
several to take, longest first; a step's units and their order depend on nothing but the plan and the number of threads.
Numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stemcache.kernels.plan import AttentionPlan, WorkItem

Ints = NDArray[np.int64]

PACKED_ROWS = 192
"""Rows of a unit times query heads of a KV head, if one row has not more: with 64 columns a head its outputs are 48 KB,
which a core's second-level cache holds beside the keys."""
UNITS_PER_THREAD = 4
"""So many units a thread, that the last ones end at about the same time (an estimate)."""
SPLIT_TOKENS = 256
"""Keys are cut at multiples of this: a partial result of a row is written and read back in the time of some 20 keys."""

UNIT = np.dtype(
    [
        (name, np.int64)
        for name in ("first_row", "n_rows", "first_chunk", "start", "stop", "full_start", "full_stop", "partial")
    ]
)
"""first_row, n_rows: its part of `Units.rows`. first_chunk: place in `Units.chunks` of the chunk that holds `start`.
start, stop: positions of its keys. full_start, full_stop: those that all its rows see. partial: number of its first
row's partial result, or -1 where its rows have no other."""


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """units: UNIT[n], longest first. rows: int64, rows of the step. chunks: int64, pool slots. merged_rows: int64[m],
    each with the partial results merged_partials[merged_begin[i] : merged_begin[i + 1]]. n_partials: of rows."""

    units: NDArray[np.void]
    rows: Ints
    chunks: Ints
    merged_rows: Ints
    merged_begin: Ints
    merged_partials: Ints
    n_partials: int


@dataclass(slots=True)
class _Block:
    """Rows of an item that are read together, and the keys that any of them sees."""

    item: WorkItem
    rows: Ints
    start: int
    stop: int
    full_start: int
    full_stop: int

    def cost(self, group: int) -> int:
        """In vectors of 16 rows times keys; preparing the keys' values takes about half of one."""
        return (2 * -(-len(self.rows) * group // 16) + 1) * (self.stop - self.start)


def cut(plan: AttentionPlan, *, window: int | None, group: int, kv_heads: int, threads: int) -> Units:
    """The units of a plan. group: query heads of a KV head."""
    blocks = [block for item in plan.items for block in _blocks(plan, item, window, max(1, PACKED_ROWS // group))]
    total = sum(block.cost(group) for block in blocks) * kv_heads
    most = total / (UNITS_PER_THREAD * threads) if threads > 1 else total
    pieces = [(block, start, stop) for block in blocks for start, stop in _pieces(block, block.cost(group) / most)]
    pieces.sort(key=lambda piece: -piece[0].cost(group) * (piece[2] - piece[1]) // (piece[0].stop - piece[0].start))
    seen = np.bincount(np.concatenate([block.rows for block, _, _ in pieces]), minlength=plan.n_rows)
    assert seen.min() > 0, "a row without any visible key"
    first_row = first_chunk = partials = 0
    units, rows, chunks, owners = [], [], [], []
    for block, start, stop in pieces:
        run = _run(block.item, start, stop, plan.chunk_tokens)
        partial = -1
        if seen[block.rows].max() > 1:
            partial, partials = partials, partials + len(block.rows)
            owners.append(block.rows)
        ends = start, stop, block.full_start, block.full_stop
        units.append((first_row, len(block.rows), first_chunk, *ends, partial))
        rows.append(block.rows)
        chunks.append(run)
        first_row, first_chunk = first_row + len(block.rows), first_chunk + len(run)
    owner = np.concatenate(owners) if owners else np.zeros(0, np.int64)
    merged, counts = np.unique(owner, return_counts=True)
    return Units(
        np.array(units, UNIT),
        np.concatenate(rows).astype(np.int64),
        np.concatenate(chunks).astype(np.int64),
        merged.astype(np.int64),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.argsort(owner, kind="stable").astype(np.int64),
        partials,
    )


def _blocks(plan: AttentionPlan, item: WorkItem, window: int | None, most_rows: int) -> Iterator[_Block]:
    for i in range(0, len(item.rows), most_rows):
        rows = item.rows[i : i + most_rows]
        positions = plan.positions[rows]
        first, last = int(positions.min()), int(positions.max())
        reach = last + 1 if window is None else window
        start, stop = max(item.kv_start, first - reach + 1), min(item.kv_stop, last + 1)
        if start < stop:
            yield _Block(item, rows, start, stop, last - reach + 1, first + 1)


def _pieces(block: _Block, parts: float) -> Iterator[tuple[int, int]]:
    """The block's keys in about so many parts, cut at multiples of SPLIT_TOKENS."""
    keys = block.stop - block.start
    step = max(1, round(keys / max(1, np.ceil(parts)) / SPLIT_TOKENS)) * SPLIT_TOKENS
    start = block.start
    while start < block.stop:
        stop = (start // SPLIT_TOKENS * SPLIT_TOKENS) + step
        if block.stop - stop < SPLIT_TOKENS // 2:  # not a piece for a few keys
            stop = block.stop
        yield start, stop
        start = stop


def _run(item: WorkItem, start: int, stop: int, size: int) -> NDArray[np.int32]:
    """The item's chunks that hold the positions [start, stop)."""
    return item.chunks[(start - item.kv_start) // size : -(-(stop - item.kv_start) // size)]
