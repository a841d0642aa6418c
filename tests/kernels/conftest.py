"""Random forests of sequences with a pool to match: the material of all kernel tests, for every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from stemcache.kernels.plan import AttentionPlan, SequenceRows


@dataclass(frozen=True)
class Batch:
    """A step: sequences over one pool layer, with the rows' queries, keys and values.

    `pool` already holds the rows' keys and values; chunks that no sequence names are NaN.
    """

    sequences: list[SequenceRows]
    plan: AttentionPlan
    pool: Tensor
    query: Tensor

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)


class Pool:
    """Hands out chunk ids, in one run or in scattered order."""

    def __init__(self, chunks: int, rng: np.random.Generator, *, fragmented: bool) -> None:
        ids = rng.permutation(chunks) if fragmented else np.arange(chunks)
        self._ids = [int(i) for i in ids]

    def take(self, n: int) -> list[int]:
        taken, self._ids = self._ids[:n], self._ids[n:]
        assert len(taken) == n, "the test's pool is too small"
        return taken


def random_sequences(
    seed: int, *, chunk_tokens: int, roots: int = 2, depth: int = 3, max_run: int = 6, fragmented: bool = False
) -> tuple[list[SequenceRows], int]:
    """A forest of `roots` trees, plus one sequence alone, in shuffled order: decode rows, short and long chunked
    prefills, rows that begin exactly at a shared node's end. Returns the sequences and the pool's size in chunks."""
    rng = np.random.default_rng(seed)
    size = 4096
    pool = Pool(size, rng, fragmented=fragmented)
    sequences: list[SequenceRows] = []

    def finish(prefix: list[int]) -> None:
        rows = int(rng.choice([1, 1, 1, 4, 17, 80]))
        before = int(rng.integers(0, 3 * chunk_tokens)) if rng.random() < 0.7 else 0
        start = len(prefix) * chunk_tokens + before
        stop = start + rows
        private = pool.take(-(-stop // chunk_tokens) - len(prefix) + int(rng.integers(0, 2)))
        sequences.append(SequenceRows(np.array(prefix + private, dtype=np.int32), start, stop))

    def grow(prefix: list[int], level: int) -> None:
        node = prefix + pool.take(int(rng.integers(1, max_run + 1)))
        for _ in range(int(rng.integers(1, 4))):
            if level + 1 < depth and rng.random() < 0.5:
                grow(node, level + 1)
            else:
                finish(node)

    for _ in range(roots):
        grow([], 0)
    finish([])
    rng.shuffle(sequences)  # type: ignore[arg-type]
    return sequences, size


def make_batch(
    sequences: list[SequenceRows],
    *,
    chunk_tokens: int,
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """Random queries and a pool in which all chunks but the sequences' own are poisoned with NaN."""
    generator = torch.Generator().manual_seed(seed)
    used = np.unique(np.concatenate([s.chunks for s in sequences]))
    pool = torch.full((2, kv_heads, int(used.max()) + 2, chunk_tokens, head_dim), float("nan"), dtype=dtype)
    own = torch.randn((2, kv_heads, len(used), chunk_tokens, head_dim), generator=generator).to(dtype)
    pool[:, :, torch.from_numpy(used.astype(np.int64))] = own
    plan = AttentionPlan.build(sequences, chunk_tokens=chunk_tokens)
    query = torch.randn((plan.n_rows, kv_heads * group, head_dim), generator=generator).to(dtype)
    return Batch(sequences, plan, pool, query)


@pytest.fixture(scope="session")
def forests() -> Callable[..., tuple[list[SequenceRows], int]]:
    return random_sequences


@pytest.fixture(scope="session")
def batches() -> Callable[..., Batch]:
    return make_batch
