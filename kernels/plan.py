"""The attention plan of one step: which rows read which chunks, computed once and used by every layer.

Invariant: the items cover every (row, visible key) pair exactly once. A shared item lies wholly before the first new
position of each of its sequences, so all its rows see all its keys; the rows' own keys are always in private items.
Numpy only: the same plan drives the reference, the CPU and the GPU backends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from stemcache.kernels.forest import Forest

SHARE_TOKENS = 256
"""Tokens that sharing a node must spare its readers: one more attention call costs 30 to 40 us on the measured CPU,
which is what one row takes over 256 keys. Derived from those two times; the threshold itself was not swept."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sharing:
    """When a node is read once for all its readers, counted in key tokens that need not be read again.

    fixed_tokens: what the node must spare in any case.
    row_tokens: what one partial result of one row costs to write and to read back; a reader pays it for the item, for
        every `split_tokens` of it, and once more because its own part is then no longer its only one.
    split_tokens: the length to which a backend cuts long items.
    max_rows: sequences with more new rows do not join: they fill a backend's tiles by themselves, and would only pay
        for partial results.
    batch_invariant: nodes end at multiples of split_tokens, and backends that know of it cut there and nowhere else,
        so that a row's result does not depend on its batch.
    """

    fixed_tokens: int = SHARE_TOKENS
    row_tokens: float = 0.0
    split_tokens: int = 256
    max_rows: int | None = None
    batch_invariant: bool = False

    def pays(self, branches: int, rows: int, tokens: int) -> bool:
        """Whether to share `tokens` tokens that `rows` rows on `branches` branches would otherwise read one by one."""
        partials = self.row_tokens * rows * (1 + tokens / self.split_tokens)
        return tokens > 0 and (branches - 1) * tokens >= self.fixed_tokens + partials


@dataclass(frozen=True, slots=True, eq=False)
class SequenceRows:
    """One sequence's part of a step: its new rows are the positions `[start, stop)`.

    chunks: int32[n], pool slots of the positions `[0, n * chunk_tokens)`, where `n * chunk_tokens >= stop`.
    start: the first query position, which is also the number of tokens already in the pool.
    stop: one past the last query position.
    """

    chunks: NDArray[np.int32]
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a sequence needs 0 <= start < stop, got start={self.start}, stop={self.stop}")


@dataclass(frozen=True, slots=True, eq=False)
class WorkItem:
    """Rows against one run of chunks: keys at positions `[kv_start, kv_stop)`, as far as each row sees them.

    rows: int64[r], rows of the step. In a private item they are one sequence's rows, positions ascending by one.
    chunks: int32[m], the run; chunk i holds the positions from `kv_start + i * chunk_tokens`.
    shared: read for several sequences at once (chunk first), or for one (sequence first).
    """

    rows: NDArray[np.int64]
    chunks: NDArray[np.int32]
    kv_start: int
    kv_stop: int
    shared: bool


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Immutable; build it with `AttentionPlan.build`. T rows, in the order of `sequences`.

    positions: int64[T], absolute position of each row.
    token_slots: int64[T], `chunk id * chunk_tokens + offset`, where each row's own key and value are written.
    """

    sequences: tuple[SequenceRows, ...]
    chunk_tokens: int
    positions: NDArray[np.int64]
    token_slots: NDArray[np.int64]
    items: tuple[WorkItem, ...]
    max_chunk: int
    sharing: Sharing
    _derived: dict[Hashable, object] = field(default_factory=dict, repr=False)

    @property
    def n_rows(self) -> int:
        return len(self.positions)

    @classmethod
    def build(
        cls, sequences: Sequence[SequenceRows], *, chunk_tokens: int, sharing: Sharing | None = None
    ) -> AttentionPlan:
        """Plan one step over `sequences`. sharing: which nodes to share; by default those that pay on a CPU.

        Raises ValueError for an empty step, a chunk size that is not a power of two from 16 to 256, chunks that do
        not reach `stop`, or a negative chunk id, and for a batch-invariant split that is no multiple of the chunk.
        """
        sharing = sharing or Sharing()
        if sharing.batch_invariant and sharing.split_tokens % chunk_tokens:
            raise ValueError(
                f"batch-invariant splits of {sharing.split_tokens} tokens would cut chunks of {chunk_tokens}"
            )
        if not sequences:
            raise ValueError("a plan needs at least one sequence")
        if chunk_tokens not in (16, 32, 64, 128, 256):
            raise ValueError(f"chunk_tokens must be a power of two from 16 to 256, got {chunk_tokens}")
        chunks = [_needed_chunks(sequence, chunk_tokens) for sequence in sequences]
        starts = np.array([s.start for s in sequences], dtype=np.int64)
        counts = np.array([s.stop for s in sequences], dtype=np.int64) - starts
        row_begin = np.cumsum(counts) - counts
        positions = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(starts - row_begin, counts)
        lengths = np.array([len(c) for c in chunks], dtype=np.int64)
        flat = np.concatenate(chunks)
        index = np.repeat(np.cumsum(lengths) - lengths, counts) + positions // chunk_tokens
        token_slots = flat[index].astype(np.int64) * chunk_tokens + positions % chunk_tokens
        if flat.min() < 0:
            raise ValueError("chunk ids must not be negative")
        items = _items(sequences, chunks, row_begin, chunk_tokens, sharing)
        return cls(tuple(sequences), chunk_tokens, positions, token_slots, items, int(flat.max()), sharing)

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, kept under `key` for the life of the plan: what a backend derives once and all layers use."""
        if key not in self._derived:
            self._derived[key] = make()
        return cast(T, self._derived[key])

    def check(self) -> None:
        """Raise AssertionError unless every row meets each key it sees in exactly one item, in the right chunk."""
        size = self.chunk_tokens
        owner = np.repeat(np.arange(len(self.sequences)), [s.stop - s.start for s in self.sequences])
        spans: list[list[tuple[int, int]]] = [[] for _ in range(self.n_rows)]
        for item in self.items:
            assert item.kv_start % size == 0, "an item begins inside a chunk"
            assert item.kv_start < item.kv_stop <= item.kv_start + len(item.chunks) * size
            assert len(np.unique(item.rows)) == len(item.rows), "a row is twice in one item"
            if not item.shared:
                assert (np.diff(item.rows) == 1).all(), "a private item's rows do not follow one another"
                assert len(set(owner[item.rows])) == 1, "a private item has two owners"
            depth = item.kv_start // size
            for i in set(owner[item.rows].tolist()):
                run = self.sequences[i].chunks[depth : depth + len(item.chunks)]
                assert np.array_equal(run, item.chunks), "an item reads chunks of another sequence"
                assert not item.shared or item.kv_stop <= self.sequences[i].start, "a shared item holds new rows' keys"
            for row in item.rows:
                spans[row].append((item.kv_start, item.kv_stop))
        for row, found in enumerate(spans):
            end = 0
            for start, stop in sorted(found):
                assert start == end, f"row {row}: keys [{min(start, end)}, {max(start, end)}) are read twice or never"
                end = stop
            assert end > self.positions[row], f"row {row}: keys from {end} on are never read"


def _needed_chunks(sequence: SequenceRows, chunk_tokens: int) -> NDArray[np.int32]:
    """The sequence's chunks up to `stop`; a reserved chunk beyond it is nobody's business."""
    chunks = np.asarray(sequence.chunks, dtype=np.int32)
    needed = -(-sequence.stop // chunk_tokens)
    if chunks.ndim != 1 or len(chunks) < needed:
        raise ValueError(f"{chunks.size} chunks of {chunk_tokens} tokens do not reach position {sequence.stop}")
    return chunks[:needed]


def _items(
    sequences: Sequence[SequenceRows],
    chunks: list[NDArray[np.int32]],
    row_begin: NDArray[np.int64],
    chunk_tokens: int,
    sharing: Sharing,
) -> tuple[WorkItem, ...]:
    """Cut the forest into work items, shared ones first.

    Only the whole chunks before `start` may be shared, so that a shared item never needs a mask. A node that does
    not pay is left to its children, which then begin where it began: every item stays one run of positions.
    """
    forest = Forest.build([run[: s.start // chunk_tokens] for s, run in zip(sequences, chunks, strict=True)])
    order = forest.order
    rows = [np.arange(row_begin[i], row_begin[i] + sequences[i].stop - sequences[i].start) for i in order]
    counts = [len(own) for own in rows]
    joins = [sharing.max_rows is None or count <= sharing.max_rows for count in counts]
    align = sharing.split_tokens // chunk_tokens if sharing.batch_invariant else 1
    begin = [0] * len(order)
    items: list[WorkItem] = []
    for node in forest.nodes():
        readers = [k for k in range(node.first, node.last) if joins[k]]
        if not readers:
            continue
        run_begin, end = begin[readers[0]], node.end // align * align
        branches = min(node.branches, len(readers))
        if not sharing.pays(branches, sum(counts[k] for k in readers), (end - run_begin) * chunk_tokens):
            continue
        for k in readers:
            begin[k] = end
        run = chunks[order[readers[0]]][run_begin:end]
        node_rows = np.concatenate([rows[k] for k in readers])
        items.append(WorkItem(node_rows, run, run_begin * chunk_tokens, end * chunk_tokens, shared=True))
    for k, i in enumerate(order):
        items.append(WorkItem(rows[k], chunks[i][begin[k] :], begin[k] * chunk_tokens, sequences[i].stop, shared=False))
    return tuple(items)
