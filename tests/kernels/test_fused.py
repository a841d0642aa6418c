"""The fused CPU kernel in bfloat16 against the float64 reference, on pools whose free chunks are NaN; and its units."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from pairs import needs_pairs

from stemcache.kernels import bfloat16_pairs, cpu, fused, openmp
from stemcache.kernels.attention import attend
from stemcache.kernels.fused_units import SPLIT_TOKENS, cut
from stemcache.kernels.plan import SequenceRows

TOLERANCE = 6e-3
"""Relative to the largest output: half an ulp of bfloat16 (2e-3) for the output and as much for the weights, and where
many keys weigh alike the outputs are small beside them. Half of what the flash kernel is given, as nothing is rounded
between partial results and their merge."""


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def sequence(chunks: list[int], start: int, stop: int) -> SequenceRows:
    return SequenceRows(np.array(chunks, dtype=np.int32), start, stop)


def assert_matches(batch: Any, **options: Any) -> None:
    expected = attend(
        batch.query.float(), batch.pool.float(), batch.plan, scale=batch.scale, backend="reference", **options
    )
    actual = fused.attend(batch.query, batch.pool, batch.plan, scale=batch.scale, **options)
    assert actual.dtype == torch.bfloat16
    error = float((actual.float() - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE, f"relative error {error:.1e}"


@needs_pairs
@pytest.mark.parametrize("seed", range(12))
def test_random_forests(forests: Callable[..., Any], batches: Callable[..., Any], seed: int) -> None:
    torch.set_num_threads(1 + seed % 4)
    kv_heads, group, head_dim = [(2, 1, 64), (1, 3, 128), (2, 8, 16), (3, 5, 80), (1, 200, 32), (2, 2, 256)][seed % 6]
    chunk_tokens = (16, 64, 128, 256, 32)[seed % 5]
    sequences, _ = forests(
        seed, chunk_tokens=chunk_tokens, roots=1 + seed % 3, max_run=(40, 8)[seed % 2], fragmented=seed >= 6
    )
    batch = batches(
        sequences,
        chunk_tokens=chunk_tokens,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        seed=seed,
    )
    sinks = torch.randn(batch.query.shape[1], generator=torch.Generator().manual_seed(seed))
    assert_matches(batch)
    assert_matches(batch, window=(5, 40, 300)[seed % 3])
    assert_matches(batch, sinks=sinks, window=(700, 100, 20)[seed % 3])
    assert_matches(batch, sinks=sinks.bfloat16())


@needs_pairs
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 17, 63, 64, 65, 501])
def test_awkward_lengths(batches: Callable[..., Any], tokens: int) -> None:
    n = -(-tokens // 64)
    for start in {0, tokens // 2, tokens - 1}:
        run = sequence(list(range(3, 3 + n)), start, tokens)
        batch = batches([run], chunk_tokens=64, head_dim=64, dtype=torch.bfloat16, seed=tokens)
        for window in (None, 1, 7, 48, 64, 200):
            assert_matches(batch, window=window)


@needs_pairs
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize(("group", "new"), [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2)])
def test_few_rows(batches: Callable[..., Any], group: int, new: int, head_dim: int) -> None:
    """Up to four rows of queries, whose lanes are keys where the head fills them, and more beside them."""
    rng = np.random.default_rng(group * new * head_dim)
    for chunk_tokens in (16, 64, 128):
        sequences = []
        for i in range(3):
            start = int(rng.integers(0, 700))
            n_chunks = -(-(start + new) // chunk_tokens)
            sequences.append(sequence((i * 64 + rng.permutation(64))[:n_chunks].tolist(), start, start + new))
        sequences.append(sequence(list(range(200, 210)), 3, 12))
        batch = batches(
            sequences, chunk_tokens=chunk_tokens, kv_heads=2, group=group, head_dim=head_dim, dtype=torch.bfloat16
        )
        for window in (None, 1, 7, 100):
            assert_matches(batch, window=window)
        assert_matches(batch, sinks=torch.linspace(-2, 2, 2 * group))


@needs_pairs
def test_few_rows_that_are_broken_or_large(batches: Callable[..., Any]) -> None:
    batch = batches([sequence([0, 1], 69, 70), sequence([2, 3], 80, 81)], chunk_tokens=64, dtype=torch.bfloat16)
    assert batch.query.shape[1] // batch.pool.shape[1] <= 4
    batch.query.mul_(200.0)
    assert_matches(batch)
    nothing = fused.attend(batch.query, batch.pool, batch.plan, scale=batch.scale, sinks=torch.full((6,), 5000.0))
    assert not nothing.any()
    batch.query[0, 2, 5] = float("nan")
    batch.pool[1, 1, 3, 4, 0] = float("nan")  # the value of a key that the second sequence sees, of the second KV head
    out = fused.attend(batch.query, batch.pool, batch.plan, scale=batch.scale)
    expected = torch.zeros(2, 6, dtype=torch.bool)
    expected[0, 2] = True
    expected[1, 3:] = True
    assert torch.equal(out.isnan().any(dim=2), expected)


@needs_pairs
@pytest.mark.parametrize("window", [None, 64, 300, 5000])
def test_long_prefill_beside_decode(batches: Callable[..., Any], window: int | None) -> None:
    """600 new rows after 1,000 old tokens, a fresh prompt and decode rows over one prefix."""
    ids = [int(i) for i in np.random.default_rng(0).permutation(200)]
    prefix, rest = ids[:20], ids[20:]
    sequences = [sequence([*prefix, rest.pop(), rest.pop()], 1300 + i, 1301 + i) for i in range(4)]
    sequences.insert(2, sequence([*prefix[:12], *[rest.pop(0) for _ in range(14)]], 1000, 1600))
    sequences.append(sequence([rest.pop(0) for _ in range(5)], 0, 300))
    batch = batches(sequences, chunk_tokens=64, kv_heads=1, group=2, dtype=torch.bfloat16)
    assert_matches(batch, window=window)
    assert_matches(batch, window=window, sinks=torch.linspace(-2, 2, 2))


@needs_pairs
def test_large_scores_do_not_overflow(batches: Callable[..., Any]) -> None:
    run = list(range(12))
    batch = batches([sequence([*run, 20 + i], 768, 769) for i in range(3)], chunk_tokens=64, dtype=torch.bfloat16)
    batch.query.mul_(200.0)
    assert_matches(batch)
    assert_matches(batch, sinks=torch.full((6,), 50.0))
    nothing = fused.attend(batch.query, batch.pool, batch.plan, scale=batch.scale, sinks=torch.full((6,), 5000.0))
    assert not nothing.any()


@needs_pairs
def test_what_is_broken_stays_visible(batches: Callable[..., Any]) -> None:
    """A NaN in a row's query, or in a key that it sees, is in its output, and in no other row's."""
    batch = batches([sequence([0, 1], 60, 70), sequence([2], 5, 9)], chunk_tokens=64, dtype=torch.bfloat16)
    batch.query[3, 2, 5] = float("nan")
    batch.pool[0, 1, 1, 4, 0] = float("nan")  # position 68, that rows 8 and 9 see with the second KV head's queries
    out = fused.attend(batch.query, batch.pool, batch.plan, scale=batch.scale)
    expected = torch.zeros(14, 6, dtype=torch.bool)
    expected[3, 2] = True
    expected[8:10, 3:] = True
    assert torch.equal(out.isnan().any(dim=2), expected)


@needs_pairs
def test_a_layer_of_a_larger_pool_and_queries_in_any_layout(batches: Callable[..., Any]) -> None:
    run = list(range(12))
    sequences = [sequence([*run, 20 + i], 768, 770) for i in range(3)]
    batch = batches(sequences, chunk_tokens=64, head_dim=64, dtype=torch.bfloat16)
    expected = fused.attend(batch.query, batch.pool, batch.plan, scale=batch.scale)
    pool = torch.stack([torch.zeros_like(batch.pool), batch.pool, torch.zeros_like(batch.pool)])
    query = batch.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(fused.attend(query, pool[1], batch.plan, scale=batch.scale), expected)


@needs_pairs
def test_the_same_bits_again_and_beside_another_thread(batches: Callable[..., Any]) -> None:
    """Which thread takes a unit depends on time; what a unit gives does not."""
    run = list(range(20))
    batch = batches(
        [sequence([*run, 20 + i], 1280 + i, 1282 + i) for i in range(5)], chunk_tokens=64, dtype=torch.bfloat16
    )
    expected = fused.attend(batch.query, batch.pool, batch.plan, scale=batch.scale)

    def again(_: int) -> bool:
        torch.set_num_threads(2)  # a setting of each thread
        other = batches(batch.sequences, chunk_tokens=64, dtype=torch.bfloat16)
        return all(
            torch.equal(fused.attend(other.query, other.pool, other.plan, scale=other.scale), expected)
            for _ in range(50)
        )

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(again, range(3)))


@needs_pairs
def test_the_backend_takes_it_where_it_serves(batches: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves to the flash kernel what it does not: other dtypes, softcap, odd head widths."""
    calls = []
    plain = fused.attend
    monkeypatch.setattr(bfloat16_pairs, "has_amx", lambda: False)
    monkeypatch.setattr(cpu.fused, "attend", lambda *given, **named: calls.append(1) or plain(*given, **named))
    for expected, head_dim, dtype, softcap in [
        (1, 64, torch.bfloat16, None),
        (0, 64, torch.float32, None),
        (0, 64, torch.float16, None),
        (0, 40, torch.bfloat16, None),
        (0, 64, torch.bfloat16, 3.0),
    ]:
        calls.clear()
        batch = batches([sequence([1], 0, 5)], chunk_tokens=64, head_dim=head_dim, dtype=dtype)
        attend(batch.query, batch.pool, batch.plan, scale=batch.scale, softcap=softcap)
        assert len(calls) == expected


def test_without_numba_it_says_so_and_the_flash_kernel_serves(
    batches: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(bfloat16_pairs, "has_amx", lambda: False)
    monkeypatch.setattr(openmp, "has_team", lambda: True)
    monkeypatch.setitem(sys.modules, "stemcache.kernels.vector_ops", None)
    monkeypatch.delattr("stemcache.kernels.vector_ops", raising=False)
    bfloat16_pairs.can_run.cache_clear()
    try:
        batch = batches([sequence([1], 0, 5)], chunk_tokens=64, head_dim=64, dtype=torch.bfloat16)
        out = attend(batch.query, batch.pool, batch.plan, scale=batch.scale)
        expected = attend(batch.query, batch.pool, batch.plan, scale=batch.scale, backend="reference")
        assert (out - expected).abs().max() < 0.05
        assert "without numba" in caplog.text
        assert not bfloat16_pairs.can_run()
    finally:
        bfloat16_pairs.can_run.cache_clear()


@pytest.mark.parametrize("seed", range(20))
def test_units_cover_every_visible_pair_once(
    forests: Callable[..., Any], batches: Callable[..., Any], seed: int
) -> None:
    chunk_tokens, group, kv_heads = (16, 64, 256)[seed % 3], (1, 3, 70, 300)[seed % 4], 1 + seed % 3
    sequences, _ = forests(seed, chunk_tokens=chunk_tokens, max_run=(40, 8)[seed % 2], fragmented=True)
    plan = batches(sequences, chunk_tokens=chunk_tokens).plan
    position, window = plan.positions, (None, 50, 700)[seed % 3]
    owner = np.repeat(np.arange(len(sequences)), [s.stop - s.start for s in sequences])
    units = cut(plan, window=window, group=group, kv_heads=kv_heads, threads=1 + seed % 5)
    seen = np.zeros((plan.n_rows, int(position.max()) + 1), int)
    partials: dict[int, list[int]] = {}
    for unit in units.units:
        rows = units.rows[unit["first_row"] :][: unit["n_rows"]]
        keys = np.arange(unit["start"], unit["stop"])
        visible = keys <= position[rows][:, None]
        if window is not None:
            visible &= keys > position[rows][:, None] - window
        assert visible[:, (keys >= unit["full_start"]) & (keys < unit["full_stop"])].all()
        for i, row in enumerate(rows):
            seen[row, keys[visible[i]]] += 1
            chunks = sequences[owner[row]].chunks[keys // chunk_tokens]
            assert (units.chunks[unit["first_chunk"] + keys // chunk_tokens - keys[0] // chunk_tokens] == chunks).all()
            partials.setdefault(int(row), []).append(int(unit["partial"]) + i if unit["partial"] >= 0 else -1)
    keys = np.arange(seen.shape[1])
    expected = (keys <= position[:, None]) & (keys > position[:, None] - (window or len(keys)))
    assert (seen == expected).all()
    merged = {
        int(row): sorted(units.merged_partials[units.merged_begin[i] : units.merged_begin[i + 1]].tolist())
        for i, row in enumerate(units.merged_rows)
    }
    assert merged == {row: sorted(of) for row, of in partials.items() if of != [-1]}
    assert sorted(part for of in merged.values() for part in of) == list(range(units.n_partials))


def test_few_long_sequences_are_split_for_the_threads(batches: Callable[..., Any]) -> None:
    plan = batches([sequence(list(range(64)), 4000, 4001)], chunk_tokens=64).plan
    whole = cut(plan, window=None, group=3, kv_heads=1, threads=1)
    assert len(whole.units) == 1
    assert len(whole.merged_rows) == 0
    parts = cut(plan, window=None, group=3, kv_heads=1, threads=4)
    assert len(parts.units) >= 4
    assert all(unit["start"] % SPLIT_TOKENS == 0 for unit in parts.units)
    lengths = [int(unit["stop"] - unit["start"]) for unit in parts.units]
    assert lengths == sorted(lengths, reverse=True)
