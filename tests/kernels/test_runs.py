"""Scattered rows: several runs of one sequence's positions in a step, as where the tokens between them were moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from stemcache.kernels.attention import Backend, append_kv, attend
from stemcache.kernels.plan import AttentionPlan, SequenceRows, Sharing

EAGER = Sharing(fixed_tokens=0)  # shares whatever can be shared


def cut(rng: np.random.Generator, sequence: SequenceRows) -> list[SequenceRows]:
    """Some of a sequence's rows, in runs."""
    n = sequence.stop - sequence.start
    edges = sorted(rng.choice(n + 1, size=min(n + 1, 2 * int(rng.integers(1, 5))), replace=False).tolist())
    pairs = list(zip(edges[::2], edges[1::2], strict=False)) or [(0, n)]
    return [SequenceRows(sequence.chunks, sequence.start + a, sequence.start + b) for a, b in pairs]


CASES = [(backend, seed, window) for backend in ("reference", "cpu") for seed in range(3) for window in (None, 21)]


@pytest.mark.parametrize(("backend", "seed", "window"), [*CASES, ("triton", 0, None)])  # the interpreter is slow
def test_rows_of_runs_are_those_of_the_whole(
    batches: Callable[..., Any], backend: Backend, seed: int, window: int | None
) -> None:
    """Two sequences with a common beginning, cut into runs, beside one that is whole: each row as in a step of all."""
    if backend == "triton":
        pytest.importorskip("triton", reason="the GPU kernels need Triton: pip install 'stemcache[gpu]'")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng(seed)
    shared, chunks = list(range(3)), iter(rng.permutation(np.arange(3, 40)).tolist())
    whole = []
    for start in (30, 48, 0):
        stop = start + int(rng.integers(20, 110))
        own = [next(chunks) for _ in range(-(-stop // 16) - (3 if start else 0))]
        whole.append(SequenceRows(np.array((shared if start else []) + own, dtype=np.int32), start, stop))
    batch = batches(whole, chunk_tokens=16, kv_heads=1, seed=seed)
    expected = attend(batch.query, batch.pool, batch.plan, scale=batch.scale, window=window, backend="reference")
    row_of = {int(slot): row for row, slot in enumerate(batch.plan.token_slots)}

    runs = [*cut(rng, whole[0]), whole[2], *cut(rng, whole[1])]
    for sharing in (EAGER,) if backend == "triton" else (None, EAGER):
        plan = AttentionPlan.build(runs, chunk_tokens=16, sharing=sharing)
        plan.check()
        rows = torch.tensor([row_of[int(slot)] for slot in plan.token_slots])
        pool = batch.pool.clone()
        key, value = pool.flatten(2, 3)[:, :, torch.from_numpy(plan.token_slots)].transpose(1, 2)
        pool.flatten(2, 3)[:, :, torch.from_numpy(plan.token_slots)] = float("nan")  # until `append_kv` writes them
        pool = pool.to(device)
        query = batch.query[rows].to(device)
        append_kv(pool, key.contiguous().to(device), value.contiguous().to(device), plan, backend=backend)
        actual = attend(query, pool, plan, scale=batch.scale, window=window, backend=backend)
        torch.testing.assert_close(actual.cpu(), expected[rows], rtol=1e-5, atol=1e-5)
