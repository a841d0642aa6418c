"""A step's metadata for the GPU: the plan's items cut into pieces that fill the machine, packed into one int32 array.

Invariant: a piece is one program's work for one KV head: at most a tile of rows against one run of keys. All layers
read the same array, whatever their windows, and everything that changes from step to step is in it, the counts
included, so that a captured graph replays with new contents. Numpy only.

The array begins with a header of HEADER words: how many rows, pieces of the large and of the small tile there are, and
where each section begins. A piece is PIECE_WORDS words:
    first entry of its rows in `rows` and `positions`, number of rows, first chunk in `chunks`, number of keys,
    position of the first key, first partial (or DIRECT: the rows have no other piece, so it writes the output itself).
A row at position p sees the piece's keys below p - (position of the first key) + 1. The row entries of an item and its
chunk ids are stored once, whatever it is cut into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemcache.kernels.plan import AttentionPlan, Sharing

Words = NDArray[np.int32]
Ints = NDArray[np.int64]

HEADER = 16
PIECE_WORDS = 6
DIRECT = -1
MIN_SPLIT = 256
"""Shortest piece worth a program of its own: a partial costs 2 * rows * group tokens' bytes (written and read in
float32, see `gpu_sharing`), which with 16 packed rows is an eighth of a piece's own."""
COUNTS = ("n_rows", "n_large", "n_small")
SECTIONS = ("pieces", "rows", "positions", "chunks", "slots", "part_begin", "parts")
"""The header's words in order: COUNTS, then the offset of each section."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the cutting depends on besides the plan.

    group: query heads per KV head. large, small: packed rows (row times head) of the two tiles; small is 0 where
    there is none. programs: how many run at once, the multiprocessors times two.
    """

    kv_heads: int
    group: int
    large: int = 64
    small: int = 16
    programs: int = 264

    @property
    def heads(self) -> int:
        """Query heads of a tile: the whole group, unless it is wider than the tile."""
        return min(self.group, self.large)

    @property
    def head_blocks(self) -> int:
        return -(-self.group // self.heads)

    @property
    def large_rows(self) -> int:
        return self.large // self.heads

    @property
    def small_rows(self) -> int:
        """Rows of a small tile; 0 where the group does not fit into one."""
        return self.small // self.heads


@dataclass(frozen=True, slots=True, eq=False)
class StepMetadata:
    """words: int32[n], what the kernels read. n_parts: partial results that the step's pieces write."""

    words: Words
    n_rows: int
    n_large: int
    n_small: int
    n_parts: int

    @classmethod
    def build(cls, plan: AttentionPlan, geometry: Geometry) -> StepMetadata:
        """Cut and pack; see the module. Raises ValueError where a slot of the step does not fit 32 bits."""
        items = _Items.of(plan)
        pieces = _cut(plan, items, geometry)
        entries = _ranges(pieces.row_begin, pieces.n_rows)
        owners = items.rows[entries]
        n_parts_of_row = np.bincount(owners, minlength=plan.n_rows)
        direct = n_parts_of_row[items.rows[pieces.row_begin]] == 1
        part_counts = np.where(direct, 0, pieces.n_rows)
        part_begin = np.where(direct, DIRECT, np.cumsum(part_counts) - part_counts)
        split_owners = owners[np.repeat(~direct, pieces.n_rows)]
        counts = np.bincount(split_owners, minlength=plan.n_rows)
        # longest first, so that no program starts a long piece when the others are done
        order = np.lexsort((-pieces.n_keys, ~pieces.large))
        table = np.stack([*pieces.columns(), part_begin], axis=1)[order]
        n_large = int(pieces.large.sum())
        sections: list[NDArray[Any]] = [
            table.ravel(),
            items.rows,
            plan.positions[items.rows],
            np.append(items.chunks, 0),  # the kernel fetches one id ahead
            plan.token_slots,
            np.concatenate([[0], np.cumsum(counts)]),
            np.argsort(split_owners, kind="stable"),  # a row's partials by position: the plan's order
        ]
        n_small = len(order) - n_large
        words = _pack([plan.n_rows, n_large, n_small], sections)
        return cls(words, plan.n_rows, n_large, n_small, len(split_owners))

    @classmethod
    def slots_only(cls, plan: AttentionPlan) -> StepMetadata:
        """What appending needs, where no attention has been planned yet."""
        empty = np.zeros(0, dtype=np.int64)
        sections = [plan.token_slots if name == "slots" else empty for name in SECTIONS]
        return cls(_pack([plan.n_rows, 0, 0], sections), plan.n_rows, 0, 0, 0)

    def section(self, name: str) -> Words:
        """One of SECTIONS, for tests and tools."""
        index = len(COUNTS) + SECTIONS.index(name)
        last = index + 1 == len(COUNTS) + len(SECTIONS)
        return self.words[self.words[index] : None if last else self.words[index + 1]]

    def check(self, plan: AttentionPlan) -> None:
        """Raise AssertionError unless the pieces give every row each key it sees once, and each partial one reader."""
        size = plan.chunk_tokens
        rows, positions, chunks = self.section("rows"), self.section("positions"), self.section("chunks")
        assert np.array_equal(positions, plan.positions[rows]), "row entries with wrong positions"
        row_of = np.repeat(np.arange(len(plan.sequences)), [s.stop - s.start for s in plan.sequences])
        spans: list[list[tuple[int, int]]] = [[] for _ in range(plan.n_rows)]
        written = np.full(self.n_parts, -1)
        direct = np.zeros(plan.n_rows, dtype=bool)
        for begin, n, chunk, keys, start, part in self.section("pieces").reshape(-1, PIECE_WORDS).tolist():
            run = chunks[chunk : chunk - (-keys // size)]
            for i, row in enumerate(rows[begin : begin + n].tolist()):
                spans[row].append((start, start + keys))
                depth = start // size
                own = plan.sequences[row_of[row]].chunks[depth : depth + len(run)]
                assert start % size == 0, "a piece begins inside a chunk"
                assert np.array_equal(own, run), "a piece reads chunks of another sequence"
                if part == DIRECT:
                    direct[row] = True
                else:
                    assert written[part + i] == -1, "two pieces write one partial"
                    written[part + i] = row
        begins = self.section("part_begin")
        for row, found in enumerate(spans):
            end = 0
            for start, stop in sorted(found):
                assert start == end, f"row {row}: keys [{min(start, end)}, {max(start, end)}) are read twice or never"
                end = stop
            assert end > plan.positions[row], f"row {row}: keys from {end} on are never read"
            own = self.section("parts")[begins[row] : begins[row + 1]]
            assert (written[own] == row).all(), f"row {row} merges partials of another row"
            assert len(own) == (0 if direct[row] else len(found)), f"row {row} loses partials"


def gpu_sharing(*, group: int, batch_invariant: bool = False, split_tokens: int = MIN_SPLIT) -> Sharing:
    """The cost rule of a GPU: bytes of keys and values spared against bytes of partial results.

    A partial of one row is `group * (d + 1)` float32 per KV head, written and read; a token is `2 * d` 16-bit
    values: the quotient is 2 * group tokens. That is the bound's arithmetic; that it stays in the second-level cache
    is not counted.
    """
    max_rows = max(1, Geometry(1, group).large_rows // 2)
    return Sharing(
        row_tokens=2.0 * group, split_tokens=split_tokens, max_rows=max_rows, batch_invariant=batch_invariant
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Items:
    """The plan's items as arrays: item i has the entries `[row_begin, row_begin + n_rows)` of `rows`, likewise
    chunks."""

    rows: Ints
    chunks: NDArray[np.int32]
    row_begin: Ints
    n_rows: Ints
    chunk_begin: Ints
    kv_start: Ints
    kv_stop: Ints
    shared: NDArray[np.bool_]

    @classmethod
    def of(cls, plan: AttentionPlan) -> _Items:
        items = plan.items
        n_rows = np.array([len(item.rows) for item in items])
        n_chunks = np.array([len(item.chunks) for item in items])
        return cls(
            np.concatenate([item.rows for item in items]),
            np.concatenate([item.chunks for item in items]),
            np.cumsum(n_rows) - n_rows,
            n_rows,
            np.cumsum(n_chunks) - n_chunks,
            np.array([item.kv_start for item in items]),
            np.array([item.kv_stop for item in items]),
            np.array([item.shared for item in items]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    row_begin: Ints
    n_rows: Ints
    chunk_begin: Ints
    n_keys: Ints
    kv_start: Ints
    large: NDArray[np.bool_]

    def columns(self) -> tuple[Ints, ...]:
        """The piece's words but the last."""
        return self.row_begin, self.n_rows, self.chunk_begin, self.n_keys, self.kv_start


def _cut(plan: AttentionPlan, items: _Items, geometry: Geometry) -> _Pieces:
    """Items into tiles of rows, and those into runs of keys of nearly equal length."""
    size = plan.chunk_tokens
    # One tile for all in a batch-invariant step: the two use different matrix instructions, which round differently.
    large = (items.n_rows > geometry.small_rows) | plan.sharing.batch_invariant
    tile_rows = np.where(large, geometry.large_rows, geometry.small_rows)
    tiles = -(-items.n_rows // np.maximum(tile_rows, 1))
    item = np.repeat(np.arange(len(tiles)), tiles)
    row_begin = items.row_begin[item] + _counters(tiles) * tile_rows[item]
    n_rows = np.minimum(items.row_begin[item] + items.n_rows[item] - row_begin, tile_rows[item])
    # a private item's positions ascend: no row of the tile sees past the last one's
    last = plan.positions[items.rows[row_begin + n_rows - 1]]
    length = np.minimum(items.kv_stop[item], np.where(items.shared[item], items.kv_stop[item], last + 1))
    length -= items.kv_start[item]
    if plan.sharing.batch_invariant:
        split = np.full(len(length), plan.sharing.split_tokens)
    else:
        work = int(length.sum()) * geometry.kv_heads * geometry.head_blocks
        target = max(MIN_SPLIT, -(-work // geometry.programs))
        pieces = -(-length // target)
        split = -(-length // (pieces * size)) * size
    pieces = -(-length // split)
    tile = np.repeat(np.arange(len(pieces)), pieces)
    offset = _counters(pieces) * split[tile]
    item = item[tile]
    return _Pieces(
        row_begin[tile],
        n_rows[tile],
        items.chunk_begin[item] + offset // size,
        np.minimum(length[tile] - offset, split[tile]),
        items.kv_start[item] + offset,
        large[item],
    )


def _counters(counts: Ints) -> Ints:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, ..."""
    return _ranges(np.zeros_like(counts), counts)


def _ranges(begin: Ints, counts: Ints) -> Ints:
    """The ranges [begin[i], begin[i] + counts[i]) one after another."""
    ends = np.cumsum(counts)
    found: Ints = np.arange(int(ends[-1])) + np.repeat(begin - (ends - counts), counts)
    return found


def _pack(counted: list[int], sections: Sequence[NDArray[Any]]) -> Words:
    slots = sections[SECTIONS.index("slots")]
    if len(slots) and int(slots.max()) >= 1 << 31:
        raise ValueError(f"the pool is too large: slot {int(slots.max())} does not fit 32 bits; use fewer chunks")
    offsets = list(accumulate((len(section) for section in sections), initial=HEADER))
    words = np.zeros(offsets[-1], dtype=np.int32)
    words[: len(COUNTS) + len(SECTIONS)] = counted + offsets[:-1]
    for offset, section in zip(offsets, sections, strict=False):
        words[offset : offset + len(section)] = section
    return words
