"""How the CPU runs a plan: a few calls of the flash kernel, and how their partial results are merged.

Invariant: the calls of a schedule cover every visible (row, key) pair once, and the merge refers only to partials that
saw at least one key (the kernel returns log-sum-exp 0, not -inf, for a row whose keys are all masked).

Four facts of the CPU kernel shape the cuts (times: two busy x86 cores, head_dim 64, one thread, best of 25). A call
costs 20 to 30 us, so short runs of many sequences are gathered into one call. From 256 tokens on, reading a run in
place is cheaper than gathering it. Keys are read once for a query tile of 32 rows, so a KV head's whole query group
is packed into the rows. Its unit of parallel work is (batch, head, query tile), so a long run is split in the batch
dimension until the tasks balance over the threads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stemcache.kernels.cpu_call import Call, Schedule
from stemcache.kernels.merge import plan_merges
from stemcache.kernels.plan import AttentionPlan, WorkItem

Ints = NDArray[np.int64]

STRETCH_TOKENS = 256
"""Shortest run read in place, and longest gathered at once: below it a call of its own costs more than the copy."""
LONG_TOKENS = 4096
"""From here on idle threads should cost more than a call: a run gives up its broken last chunk to be split evenly (an
estimate)."""
MANY_ROWS = 64
"""From here on a piece is called by itself (a prefill); below, pieces of equal shape are batched (an estimate)."""
BUCKET_CHUNKS = 4
"""Chunks of padding accepted to save a call: one chunk of one sequence costs about 10 us, a call some 40 us."""
WINDOW_ROWS = 256
"""Rows of a long windowed prefill per piece, so that work grows with the window and not with the prompt
(an estimate)."""
SPLIT_TOKENS = 256
"""Shortest part that a run is split into for the sake of balance (an estimate)."""
PACKED_ROWS = 256
"""Up to here a KV head's query heads become rows of one call in bfloat16, so that the kernel brings the keys into its
products' layout once for all of them: a step of 96 to 192 rows over 576 or 2,048 cached keys (SmolLM2-135M's shape)
takes 0.87 to 0.93 of the time, one of 256 rows 0.96 to 0.98. With 544 rows the partials' order, less handy to merge,
costs what is won; float32 gains nothing from MANY_ROWS on."""
PADDED_SQUARE = 128
"""A prefill of R rows takes the C keys before them into its causal call if C * C is at most this many times R: rows of
zeros stand in for those that were computed before, which costs C * C / 2 pairs and saves a merge of R rows. (1,850 rows
after 64 keys: 0.6 of the time in bfloat16, 0.9 in float32; even at 300 and 140 times R.)"""
QUERY_TILE = 32
"""Query rows per task of the kernel for short queries (ATen/native/cpu/FlashAttentionKernel.cpp, q_split_size)."""


@cache
def has_amx() -> bool:
    """Whether bfloat16 products run on AMX tiles. Of a torch that cannot tell, no: guessing yes would cost more."""
    tells = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return tells is not None and bool(tells())


@dataclass(frozen=True, slots=True)
class _Tile:
    """A piece of at most STRETCH_TOKENS keys for few rows: waits to be batched with others of its shape."""

    rows: Ints
    chunks: NDArray[np.int32]
    base: int  # position of the first chunk's first token
    start: int
    stop: int


def schedule(plan: AttentionPlan, *, window: int | None, dtype: torch.dtype, group: int, kv_heads: int) -> Schedule:
    """The plan's schedule, made on first use and kept on the plan for the other layers.

    group: query heads per KV head. A window that no row's context reaches is no window.
    """
    if window is not None and window > int(plan.positions.max()):
        window = None
    threads = torch.get_num_threads()
    key = ("cpu", window, dtype, group, kv_heads, threads)
    return plan.derived(key, lambda: _Builder(plan, window, dtype, group, kv_heads, threads).build())


@dataclass(slots=True)
class _Builder:
    plan: AttentionPlan
    window: int | None
    dtype: torch.dtype
    group: int
    kv_heads: int
    threads: int
    calls: list[Call] = field(default_factory=list)
    owners: list[Ints] = field(default_factory=list)  # row of each partial; -1 where it saw no key
    tiles: list[_Tile] = field(default_factory=list)

    def build(self) -> Schedule:
        for item in self.plan.items:
            for rows in self._row_blocks(item):
                self._cut(item, rows)
        self._batch_tiles()
        return Schedule(tuple(self.calls), tuple(plan_merges(np.concatenate(self.owners), self.plan.n_rows)))

    def _row_blocks(self, item: WorkItem) -> Iterator[Ints]:
        if self.window is None or item.shared:
            yield item.rows
            return
        for i in range(0, len(item.rows), WINDOW_ROWS):
            yield item.rows[i : i + WINDOW_ROWS]

    def _cut(self, item: WorkItem, rows: Ints) -> None:
        """Cut an item into calls and tiles: keys that all rows see in place where they lie in long stretches, the
        rows' own keys by the causal form, and the rest, short or partly visible, as masked remainders."""
        first, last = self._span(item, rows)
        reach = last + 1 if self.window is None else self.window
        start, stop = max(item.kv_start, first - reach + 1), min(item.kv_stop, last + 1)
        if start >= stop:
            return
        many = len(rows) >= MANY_ROWS
        if many and not item.shared and last - first < reach:
            few_before = (first - start) ** 2 <= PADDED_SQUARE * len(rows) and last - start < reach
            begin = start if few_before else first
            self._piece(item, rows, begin, stop, causal=True)
            stop = begin
        full_start, full_stop = max(start, last - reach + 1), min(stop, first + 1)
        done = start
        for begin, end in self._stretches(item, full_start, full_stop, len(rows)):
            if not many and end - begin >= LONG_TOKENS:
                end -= (end - begin) % self.plan.chunk_tokens  # divisible, so that it can be split
            self._remainder(item, rows, done, begin)
            self._piece(item, rows, begin, end, causal=False)
            done = end
        self._remainder(item, rows, done, stop)

    def _span(self, item: WorkItem, rows: Ints) -> tuple[int, int]:
        """Least and greatest position of the rows. A private item's ascend: a step has many, with few rows each."""
        positions = self.plan.positions
        if item.shared:
            return int(positions[rows].min()), int(positions[rows].max())
        return int(positions[rows[0]]), int(positions[rows[-1]])

    def _stretches(self, item: WorkItem, start: int, stop: int, n_rows: int) -> Iterator[tuple[int, int]]:
        """The ranges within [start, stop) that are long enough, and contiguous in the pool, to be read in place.

        A partial costs the more the more rows it has, and a gather is shared by all rows: hence 4 tokens per row.
        """
        shortest = max(STRETCH_TOKENS, 4 * n_rows)
        if stop - start < shortest:
            return
        size = self.plan.chunk_tokens
        breaks = np.flatnonzero(np.diff(item.chunks) != 1) + 1
        edges = [0, *breaks.tolist(), len(item.chunks)]
        for i, j in pairwise(edges):
            begin, end = max(start, item.kv_start + i * size), min(stop, item.kv_start + j * size)
            if end - begin >= shortest:
                yield begin, end

    def _remainder(self, item: WorkItem, rows: Ints, start: int, stop: int) -> None:
        """Keys that are no stretch: tiles for few rows, pieces for many."""
        size = self.plan.chunk_tokens
        longest = max(STRETCH_TOKENS, 4 * len(rows)) // size * size
        while start < stop:
            base = start // size * size
            end = min(stop, base + longest)
            if len(rows) >= MANY_ROWS:
                self._piece(item, rows, start, end, causal=False)
            else:
                self.tiles.append(_Tile(rows, _run(item, base, end, size), base, start, end))
            start = end

    def _piece(self, item: WorkItem, rows: Ints, start: int, stop: int, *, causal: bool) -> None:
        """One call for one run of keys: a view where its chunks follow one another, else gathered."""
        size = self.plan.chunk_tokens
        base = start // size * size
        chunks = _run(item, base, stop, size)
        contiguous = bool((np.diff(chunks) == 1).all())
        first, last = self._span(item, rows)
        if causal or (stop <= first + 1 and (self.window is None or start > last - self.window)):
            visible = None  # told from the ends, since the matrix of a long prefill is large
        else:
            visible = self._visible(rows, np.arange(start, stop))
        packed = not causal and self._packs(len(rows), masked=visible is not None)
        offset = int(chunks[0]) * size if contiguous else 0
        call = Call(
            rows=self._row_index(rows),
            batch=1,
            n_rows=len(rows),
            chunks=None if contiguous else torch.from_numpy(chunks.astype(np.int64)),
            start=offset + start - base,
            stop=offset + stop - base,
            splits=self._splits(len(rows), stop - start) if contiguous and packed else 1,
            packed=packed,
            doubled=packed and self._doubles(len(rows)),
            causal=causal,
            mask=None if visible is None else self._mask(visible[None], packed),
        )
        seen = rows if visible is None else np.where(visible.any(axis=1), rows, -1)
        self._add(call, np.tile(seen, call.splits) if call.splits > 1 else seen)

    def _packs(self, n_rows: int, *, masked: bool) -> bool:
        """Whether a KV head's query heads become rows of one call.

        Not for a single bfloat16 row on AMX, for which the kernel leaves the keys' layout as it is (290 us, not 410; on
        a Zen 4, which has no AMX, 2,135 us, not 439), and not for many rows with a mask, which would be repeated for
        every head.
        """
        if self.dtype != torch.bfloat16:
            return n_rows < MANY_ROWS
        return (2 if has_amx() else 1) <= n_rows < (MANY_ROWS if masked else PACKED_ROWS + 1)

    def _doubles(self, n_rows: int) -> bool:
        """Whether the kernel gets its only row twice: a single one in bfloat16 takes it 1,970 us without AMX, two 865
        (8 heads of 64, 2,048 keys, one thread)."""
        return n_rows * self.group == 1 and self.dtype == torch.bfloat16 and not has_amx()

    def _splits(self, n_rows: int, n_keys: int) -> int:
        """The least power of two that balances the kernel's tasks over the threads (or makes many of them).

        A plan of one item has nothing to merge if it is not split, and a merge costs what balance saves up to
        LONG_TOKENS (one sequence of 2,048 bf16 tokens: 255 us whole, 212 us split, 100 us to merge).
        """
        if len(self.plan.items) == 1 and n_keys < LONG_TOKENS:
            return 1
        tasks = self.kv_heads * -(-n_rows * self.group // QUERY_TILE)
        splits = 1
        while (
            tasks * splits % self.threads
            and tasks * splits < 4 * self.threads
            and n_keys % (2 * splits) == 0
            and n_keys >= 2 * splits * SPLIT_TOKENS
        ):
            splits *= 2
        return splits

    def _batch_tiles(self) -> None:
        """Tiles with equally many rows go into one call when padding the shorter ones is cheaper than a call."""
        shapes: dict[int, list[_Tile]] = defaultdict(list)
        for tile in self.tiles:
            shapes[len(tile.rows)].append(tile)
        for tiles in shapes.values():
            tiles.sort(key=lambda tile: -len(tile.chunks))
            batch: list[_Tile] = []
            padding = 0
            for tile in tiles:
                padding += len(batch[0].chunks) - len(tile.chunks) if batch else 0
                if padding > BUCKET_CHUNKS:
                    self._tile_call(batch)
                    batch, padding = [], 0
                batch.append(tile)
            self._tile_call(batch)

    def _tile_call(self, tiles: list[_Tile]) -> None:
        """Gather the tiles' chunks, padded with their own first chunk, so that nobody else's is ever read."""
        n = len(tiles[0].chunks)
        chunks = np.stack([np.concatenate([t.chunks, np.repeat(t.chunks[:1], n - len(t.chunks))]) for t in tiles])
        rows = np.stack([t.rows for t in tiles])
        keys = np.array([t.base for t in tiles])[:, None] + np.arange(n * self.plan.chunk_tokens)
        start, stop = np.array([(t.start, t.stop) for t in tiles]).T[:, :, None]
        inside = (keys >= start) & (keys < stop)
        visible = self._visible(rows, keys, inside)
        call = Call(
            rows=self._row_index(rows.ravel()),
            batch=len(tiles),
            n_rows=rows.shape[1],
            chunks=torch.from_numpy(chunks.ravel().astype(np.int64)),
            start=0,
            stop=n * self.plan.chunk_tokens,
            splits=1,
            packed=True,
            doubled=self._doubles(rows.shape[1]),
            causal=False,
            mask=None if visible is None else self._mask(visible, packed=True),
        )
        self._add(call, rows.ravel() if visible is None else np.where(visible.any(axis=2), rows, -1).ravel())

    def _visible(self, rows: Ints, keys: Ints, inside: NDArray[np.bool_] | None = None) -> NDArray[np.bool_] | None:
        """bool[..., rows, keys]: which keys (absolute positions) each row sees; None if it is all of them."""
        position, key = self.plan.positions[rows][..., :, None], keys[..., None, :]
        visible = key <= position
        if self.window is not None:
            visible &= key > position - self.window
        if inside is not None:
            visible &= inside[..., None, :]
        return None if visible.all() else visible

    def _mask(self, visible: NDArray[np.bool_], packed: bool) -> Tensor:
        """Additive, [batch, 1, rows, keys]; packed rows repeat by the group, but a single row broadcasts."""
        seen = torch.from_numpy(visible)
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, float("-inf"))
        if packed and mask.shape[1] > 1:
            mask = mask.repeat_interleave(self.group, dim=1)
        return mask.unsqueeze(1)

    def _row_index(self, rows: Ints) -> Tensor | None:
        if len(rows) == self.plan.n_rows and (np.diff(rows) == 1).all():
            return None
        return torch.from_numpy(rows)

    def _add(self, call: Call, owners: Ints) -> None:
        self.calls.append(call)
        self.owners.append(owners)


def _run(item: WorkItem, base: int, stop: int, size: int) -> NDArray[np.int32]:
    """The item's chunks that hold the positions [base, stop); base is a multiple of the chunk size."""
    return item.chunks[(base - item.kv_start) // size : -(-(stop - item.kv_start) // size)]
