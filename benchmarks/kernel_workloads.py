"""The shapes of the kernel benchmark, blocks A to I: which sequences share what, without any tensor.

Invariant: a workload is sequences over chunk ids and nothing else; the bytes and operations that it needs at least are
counted here from those, so no kernel's own view of the work can flatter it.

  A  ChunkAttention's own setting (arXiv 2402.15220): 32 heads, no grouping, shared beginnings of 0 to 4,096 tokens
  B  grouped heads, batch 1 to 256, both sides of the point where arithmetic takes longer than memory
  C  nothing shared: the price of being able to share
  D  trees of several levels   E  several groups, as in sampling many answers to each of many prompts
  F  private parts of very different lengths   G  chunked prefill beside decode   H  other head widths
  I  sequences that come and go: the host's cost of planning, one set of buffers for all steps
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from stemcache.kernels.plan import SequenceRows

CHUNK = 64


@dataclass(frozen=True)
class Workload:
    """`levels` and `private` tell the shape to peers that want it: tokens and readers of each level, root first, and
    the tokens that are each sequence's own."""

    block: str
    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    sequences: tuple[SequenceRows, ...]

    @property
    def rows(self) -> int:
        return sum(s.stop - s.start for s in self.sequences)

    @property
    def decode(self) -> bool:
        return self.rows == len(self.sequences)

    @property
    def chunks(self) -> int:
        """Chunk ids in use, from 0."""
        return 1 + max(int(s.chunks.max()) for s in self.sequences)

    @property
    def label(self) -> str:
        return f"{self.block} {self.q_heads}/{self.kv_heads} d{self.head_dim} {self.name}"

    def bytes_needed(self, itemsize: int = 2) -> int:
        """Every visible token's key and value once, queries in, outputs out."""
        seen: dict[int, int] = {}
        for s in self.sequences:
            for i, chunk in enumerate(s.chunks[: -(-s.stop // CHUNK)].tolist()):
                seen[chunk] = max(seen.get(chunk, 0), min(CHUNK, s.stop - i * CHUNK))
        tokens = sum(seen.values())
        return itemsize * self.head_dim * 2 * (tokens * self.kv_heads + self.rows * self.q_heads)

    def operations(self) -> int:
        """Multiplications and additions of both products over the visible pairs."""
        pairs = sum((s.start + 1 + s.stop) * (s.stop - s.start) // 2 for s in self.sequences)
        return 4 * self.head_dim * self.q_heads * pairs

    def shared_tokens(self) -> int:
        """Tokens at the beginning that all sequences share in whole chunks, before any new row."""
        n = min(s.start // CHUNK for s in self.sequences)
        first = self.sequences[0].chunks[:n]
        same = np.ones(n, dtype=bool)
        for s in self.sequences[1:]:
            same &= s.chunks[:n] == first
        return CHUNK * int(n if same.all() else same.argmin())


@dataclass
class _Slots:
    """Hands out chunk ids: a run in one piece, as the pool tries to."""

    used: int = 0
    taken: list[int] = field(default_factory=list)

    def take(self, tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        n = -(-tokens // CHUNK)
        self.used += n
        return np.arange(self.used - n, self.used, dtype=np.int32)


def flat(batch: int, shared: int, private: int, *, new: int = 1) -> tuple[SequenceRows, ...]:
    """`batch` sequences over `shared` tokens and `private` of their own, the last `new` of them this step's rows."""
    slots = _Slots()
    prefix = slots.take(shared)
    stop = len(prefix) * CHUNK + private
    return tuple(SequenceRows(np.concatenate([prefix, slots.take(private)]), stop - new, stop) for _ in range(batch))


def tree(nodes: list[int], tokens: list[int]) -> tuple[SequenceRows, ...]:
    """`nodes[i]` nodes of `tokens[i]` tokens on level i; the last level's are the sequences (FastTree's notation)."""
    slots = _Slots()
    paths: list[np.ndarray[tuple[int], np.dtype[np.int32]]] = [np.zeros(0, dtype=np.int32)]
    for n, length in zip(nodes, tokens, strict=True):
        paths = [np.concatenate([paths[i * len(paths) // n], slots.take(length)]) for i in range(n)]
    stops = [(len(path) - 1) * CHUNK + (tokens[-1] - 1) % CHUNK + 1 for path in paths]
    return tuple(SequenceRows(path, stop - 1, stop) for path, stop in zip(paths, stops, strict=True))


def skewed(batch: int, shared: int, *, seed: int = 0) -> tuple[SequenceRows, ...]:
    """Private parts of 16 to 8,192 tokens, log-normally distributed."""
    lengths = np.random.default_rng(seed).lognormal(5.5, 1.3, batch).clip(16, 8192).astype(int)
    slots = _Slots()
    prefix = slots.take(shared)
    sequences = []
    for length in lengths.tolist():
        stop = len(prefix) * CHUNK + length
        sequences.append(SequenceRows(np.concatenate([prefix, slots.take(length)]), stop - 1, stop))
    return tuple(sequences)


def mixed(prefills: int, new: int, decodes: int, shared: int, private: int) -> tuple[SequenceRows, ...]:
    """Chunked prefills of `new` rows beside decode rows, all over one prefix."""
    slots = _Slots()
    prefix = slots.take(shared)
    n = len(prefix) * CHUNK
    long = [SequenceRows(np.concatenate([prefix, slots.take(new)]), n, n + new) for _ in range(prefills)]
    short = [
        SequenceRows(np.concatenate([prefix, slots.take(private)]), n + private - 1, n + private)
        for _ in range(decodes)
    ]
    return (*long, *short)


def blocks() -> list[Workload]:
    """All of A to H, in an order that takes from each block in turn: whatever is cut off, each block has been seen."""
    by_block: dict[str, list[Workload]] = {}
    for workload in _all():
        by_block.setdefault(workload.block, []).append(workload)
    longest = max(len(found) for found in by_block.values())
    return [found[i] for i in range(longest) for found in by_block.values() if i < len(found)]


def _all() -> Iterator[Workload]:
    for batch in (32, 64, 16, 128):
        for shared in (1024, 2048, 4096, 0):
            name = f"{batch} x ({shared}+256)"
            yield Workload("A", name, 32, 32, 128, "float16", flat(batch, shared, 256))
    for batch, shared, private in (
        *((32, 1024, 256), (64, 4096, 256), (256, 16384, 128), (8, 4096, 128), (1, 4096, 128), (128, 256, 512)),
        *((64, 32768, 128), (256, 1024, 512), (32, 16384, 512)),
    ):
        for q_heads, kv_heads in ((32, 8), (64, 8), (16, 1)):
            name = f"{batch} x ({shared}+{private})"
            yield Workload("B", name, q_heads, kv_heads, 128, "bfloat16", flat(batch, shared, private))
    for batch, private in ((32, 4096), (1, 32768), (256, 1024), (32, 1024), (1, 4096)):
        yield Workload("C", f"{batch} x {private}", 32, 8, 128, "bfloat16", flat(batch, 0, private))
    for q_heads, kv_heads in ((32, 8), (32, 32), (16, 8), (64, 8)):
        for nodes, tokens in (
            ([1, 4, 16, 512], [1024, 256, 128, 32]),
            ([4, 16, 256, 512], [512, 32, 128, 32]),
            ([1, 10], [4096, 416]),
        ):
            name = f"{','.join(map(str, nodes))} of {','.join(map(str, tokens))}"
            yield Workload("D", name, q_heads, kv_heads, 128, "bfloat16", tree(nodes, tokens))
    for groups, members, shared in ((16, 16, 1024), (32, 8, 4096), (16, 16, 4096), (32, 8, 1024)):
        name = f"{groups} groups of {members} x ({shared}+1024)"
        yield Workload("E", name, 32, 8, 128, "bfloat16", tree([groups, groups * members], [shared, 1024]))
    yield Workload("F", "64 x (4096+lognormal)", 32, 8, 128, "bfloat16", skewed(64, 4096))
    yield Workload("G", "8 prefills of 512, 56 decodes over 8192", 32, 8, 128, "bfloat16", mixed(8, 512, 56, 8192, 256))
    for head_dim in (64, 256):
        yield Workload("H", "64 x (4096+256)", 32, 8, head_dim, "bfloat16", flat(64, 4096, 256))


def dynamics(batch: int = 64, shared: int = 2048, steps: int = 512, every: int = 8) -> Iterator[list[SequenceRows]]:
    """Block I: decode steps; every eighth, the oldest sequence leaves and another joins over the same prefix."""
    slots = _Slots()
    prefix = slots.take(shared)
    n = len(prefix) * CHUNK
    room = steps + batch + CHUNK
    running = [(slots.take(room), n + 1 + i) for i in range(batch)]
    for step in range(steps):
        if step % every == every - 1:
            left, _ = running.pop(0)
            running.append((left, n + 1))
        running = [(own, stop + 1) for own, stop in running]
        yield [
            SequenceRows(np.concatenate([prefix, own])[: -(-stop // CHUNK)], stop - 1, stop) for own, stop in running
        ]
