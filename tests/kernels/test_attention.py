"""The CPU backend on PyTorch's flash kernel against the float64 reference, on pools whose free chunks are NaN.

(`test_fused.py` has the kernel that takes its place in bfloat16 where the processor allows.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stemcache.kernels import cpu_schedule, fused
from stemcache.kernels.attention import append_kv, attend
from stemcache.kernels.cpu_schedule import MANY_ROWS, PACKED_ROWS, PADDED_SQUARE, schedule
from stemcache.kernels.plan import SequenceRows

# Relative to the largest output. float32: summation order. 16-bit: the output's own rounding, once for the partial
# results and once for the merged one (half an ulp each), plus the kernel's 16-bit probabilities.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "is_preferred", lambda: False)


def sequence(chunks: list[int], start: int, stop: int) -> SequenceRows:
    return SequenceRows(np.array(chunks, dtype=np.int32), start, stop)


def assert_matches(batch: Any, **options: Any) -> None:
    expected = attend(
        batch.query.float(), batch.pool.float(), batch.plan, scale=batch.scale, backend="reference", **options
    )
    actual = attend(batch.query, batch.pool, batch.plan, scale=batch.scale, backend="cpu", **options)
    assert actual.dtype == batch.query.dtype
    error = float((actual.float() - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE[batch.query.dtype], f"relative error {error:.1e}"


def test_reference_is_plain_attention(batches: Callable[..., Any]) -> None:
    """The oracle itself against scaled_dot_product_attention, on one sequence small enough to see through."""
    batch = batches([sequence([2, 0], 0, 20)], chunk_tokens=16)
    key, value = batch.pool[:, :, [2, 0]].flatten(2, 3)[:, :, :20]
    expected = torch.nn.functional.scaled_dot_product_attention(
        batch.query.transpose(0, 1)[None], key[None], value[None], is_causal=True, scale=batch.scale, enable_gqa=True
    )[0].transpose(0, 1)
    actual = attend(batch.query, batch.pool, batch.plan, scale=batch.scale, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_forests(
    forests: Callable[..., Any], batches: Callable[..., Any], seed: int, dtype: torch.dtype
) -> None:
    group, head_dim = [(1, 64), (3, 128), (8, 16)][seed % 3]
    chunk_tokens = (16, 64)[seed % 2]
    sequences, _ = forests(
        seed, chunk_tokens=chunk_tokens, roots=1 + seed % 3, max_run=(40, 8)[seed % 2], fragmented=seed >= 3
    )
    batch = batches(sequences, chunk_tokens=chunk_tokens, group=group, head_dim=head_dim, dtype=dtype, seed=seed)
    sinks = torch.randn(batch.query.shape[1], generator=torch.Generator().manual_seed(seed))
    assert_matches(batch)
    assert_matches(batch, window=(5, 40, 300)[seed % 3])
    assert_matches(batch, softcap=3.0, sinks=sinks)
    assert_matches(batch, sinks=sinks, window=(700, 100, 20)[seed % 3])


@pytest.mark.parametrize("tokens", [1, 17, 63, 64, 65, 501])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_awkward_lengths(batches: Callable[..., Any], tokens: int, dtype: torch.dtype) -> None:
    """A whole prompt, its last token alone, and its second half, of every length around a chunk's edge."""
    n = -(-tokens // 64)
    for start in {0, tokens // 2, tokens - 1}:
        run = sequence(list(range(3, 3 + n)), start, tokens)
        batch = batches([run], chunk_tokens=64, head_dim=64, dtype=dtype, seed=tokens)
        for options in ({}, {"window": 1}, {"window": 48}, {"window": 64}, {"window": 200}, {"softcap": 2.0}):
            assert_matches(batch, **options)


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("group", [1, 3])
def test_one_row_with_and_without_amx(
    batches: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, amx: bool, group: int
) -> None:
    """A single row in bfloat16 is called as the processor likes it, over a long run and over short gathered ones."""
    monkeypatch.setattr(cpu_schedule, "has_amx", lambda: amx)
    long, short = [sequence(list(range(34)), 34 * 64 - 9, 34 * 64 - 8)], [sequence([40, 50], 70, 71)]
    for sequences in (long, short, long + short, [*short, sequence([52, 41], 65, 66)]):
        batch = batches(sequences, chunk_tokens=64, group=group, head_dim=64, dtype=torch.bfloat16)
        for options in ({}, {"window": 48}, {"softcap": 2.0}):
            assert_matches(batch, **options)
            calls = schedule(
                batch.plan,
                window=options.get("window"),
                dtype=torch.bfloat16,
                group=group,
                kv_heads=batch.pool.shape[1],
            ).calls
            assert all(call.doubled is (not amx and group == 1 and call.packed) for call in calls)
            assert amx or all(call.packed for call in calls)


@pytest.mark.parametrize("head_dim", [40, 96, 256])
def test_head_widths(batches: Callable[..., Any], head_dim: int) -> None:
    run = list(range(10))
    sequences = [sequence([*run, 20 + i], 640 + i, 642 + i) for i in range(5)]
    assert_matches(batches(sequences, chunk_tokens=64, head_dim=head_dim))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_splits_for_any_number_of_threads(batches: Callable[..., Any], threads: int) -> None:
    torch.set_num_threads(threads)
    run = list(range(33))
    sequences = [sequence([*run, 40 + i], 33 * 64 + i, 33 * 64 + i + 1) for i in range(9)]
    for kv_heads in (1, 3):
        assert_matches(batches(sequences, chunk_tokens=64, kv_heads=kv_heads, head_dim=64))


@pytest.mark.parametrize("window", [None, 64, 300, 5000])
@pytest.mark.parametrize("fragmented", [False, True])
def test_long_prefill_beside_decode(batches: Callable[..., Any], window: int | None, fragmented: bool) -> None:
    """600 new rows after 1,000 old tokens, a fresh prompt and decode rows over one prefix."""
    rng = np.random.default_rng(0)
    ids = [int(i) for i in (rng.permutation(200) if fragmented else np.arange(200))]
    prefix, rest = ids[:20], ids[20:]
    sequences = [sequence([*prefix, rest.pop(), rest.pop()], 1300 + i, 1301 + i) for i in range(4)]
    sequences.insert(2, sequence([*prefix[:12], *[rest.pop(0) for _ in range(14)]], 1000, 1600))
    sequences.append(sequence([rest.pop(0) for _ in range(5)], 0, 300))
    batch = batches(sequences, chunk_tokens=64, kv_heads=1, group=2)
    assert_matches(batch, window=window)
    assert_matches(batch, window=window, softcap=2.0)


@pytest.mark.parametrize("window", [None, 64, 500, 640, 5000])
@pytest.mark.parametrize(("before", "rows"), [(1, 64), (63, 65), (64, 600), (130, 257), (277, 600), (278, 600)])
@pytest.mark.parametrize("fragmented", [False, True])
def test_prefill_after_few_tokens(
    batches: Callable[..., Any], before: int, rows: int, window: int | None, fragmented: bool
) -> None:
    """A cached system prompt before new documents: up to a length it is taken into the causal call."""
    ids = np.random.default_rng(0).permutation(20) if fragmented else np.arange(20)
    batch = batches([sequence([int(i) for i in ids], before, before + rows)], chunk_tokens=64, kv_heads=1, group=3)
    calls = schedule(batch.plan, window=window, dtype=batch.query.dtype, group=3, kv_heads=1).calls
    if window is None or window > before + rows:
        is_short = before**2 <= PADDED_SQUARE * rows
        assert is_short == (before < 278)
        assert [call.padding for call in calls] == ([before] if is_short else [0] * len(calls))
    assert_matches(batch, window=window)
    assert_matches(batch, window=window, softcap=2.0)
    assert_matches(batch, window=window, sinks=torch.linspace(-2, 2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 400, 5000])
@pytest.mark.parametrize("rows", [63, 64, 256, 257])
@pytest.mark.parametrize("fragmented", [False, True])
def test_prefill_over_many_cached_tokens(
    batches: Callable[..., Any], rows: int, window: int | None, dtype: torch.dtype, fragmented: bool
) -> None:
    """Whether the heads are packed or called one by one."""
    ids = np.random.default_rng(0).permutation(20) if fragmented else np.arange(20)
    sequences = [sequence([int(i) for i in ids], 900, 900 + rows)]
    batch = batches(sequences, chunk_tokens=64, kv_heads=2, group=3, dtype=dtype)
    calls = schedule(batch.plan, window=window, dtype=dtype, group=3, kv_heads=2).calls
    if window != 400:
        most = PACKED_ROWS if dtype == torch.bfloat16 else MANY_ROWS - 1
        assert any(call.packed for call in calls) == (rows <= most)
    assert_matches(batch, window=window)
    assert_matches(batch, window=window, softcap=2.0, sinks=torch.linspace(-2, 2, 6))


def test_identical_sequences_with_different_ends(batches: Callable[..., Any]) -> None:
    run = list(range(30))
    batch = batches([sequence(run, stop - 3, stop) for stop in (1920, 1700, 1920, 5)], chunk_tokens=64)
    assert_matches(batch)
    assert_matches(batch, window=100)


def test_large_scores_do_not_overflow(batches: Callable[..., Any]) -> None:
    run = list(range(12))
    batch = batches([sequence([*run, 20 + i], 768, 769) for i in range(3)], chunk_tokens=64)
    batch.query.mul_(200.0)
    assert_matches(batch)
    assert_matches(batch, sinks=torch.full((6,), 50.0))


def test_a_layer_of_a_larger_pool(batches: Callable[..., Any]) -> None:
    """pool[layer] has a storage offset, which the zero-copy views must respect."""
    run = list(range(12))
    batch = batches([sequence([*run, 20 + i], 768, 769) for i in range(3)], chunk_tokens=64)
    pool = torch.stack([torch.zeros_like(batch.pool), batch.pool, torch.zeros_like(batch.pool)])
    expected = attend(batch.query, batch.pool, batch.plan, scale=batch.scale)
    assert torch.equal(attend(batch.query, pool[1], batch.plan, scale=batch.scale), expected)


@pytest.mark.parametrize(
    "sequences",
    [
        [sequence([4, 5], 3, 90)],
        [sequence([5, 4], 3, 90)],
        [sequence([4, 5], 70, 71), sequence([4, 1], 64, 66), sequence([3], 0, 64)],
    ],
    ids=["run", "fragmented", "mixed"],
)
def test_append_kv_writes_the_rows_and_nothing_else(sequences: list[SequenceRows], batches: Callable[..., Any]) -> None:
    batch = batches(sequences, chunk_tokens=64)
    kv_heads, head_dim = batch.pool.shape[1], batch.pool.shape[4]
    key, value = torch.randn(2, batch.plan.n_rows, kv_heads, head_dim)
    expected = batch.pool.clone()
    row = 0
    for s in sequences:
        for position in range(s.start, s.stop):
            slot = (int(s.chunks[position // 64]), position % 64)
            expected[0, :, slot[0], slot[1]] = key[row]
            expected[1, :, slot[0], slot[1]] = value[row]
            row += 1
    append_kv(batch.pool, key, value, batch.plan)
    assert torch.equal(batch.pool.nan_to_num(9.0), expected.nan_to_num(9.0))


def call(batch: Any, **changes: Any) -> Tensor:
    given: dict[str, Any] = {"query": batch.query, "pool_layer": batch.pool, "plan": batch.plan, "scale": 1.0} | changes
    return attend(**given)


def test_what_cannot_be_served_is_refused(batches: Callable[..., Any]) -> None:
    batch = batches([sequence([1], 0, 5)], chunk_tokens=64)
    other = batches([sequence([1], 0, 5)], chunk_tokens=32)
    for match, changes in {
        "contiguous": {"pool_layer": batch.pool.transpose(3, 4)},
        "chunks of 32 tokens": {"pool_layer": other.pool},
        "reads chunk 1": {"pool_layer": batch.pool[:, :, :1].contiguous()},
        "query must be": {"query": batch.query[:3]},
        "cannot be grouped": {"query": batch.query[:, :5]},
        "same dtype": {"query": batch.query.double()},
        "window": {"window": 0},
        "softcap": {"softcap": 0.0},
        "sinks": {"sinks": torch.zeros(5)},
        "unknown attention backend": {"backend": "tpu"},
    }.items():
        with pytest.raises(ValueError, match=match):
            call(batch, **changes)
    key = torch.zeros(5, 2, 16)
    with pytest.raises(ValueError, match="value is"):
        append_kv(batch.pool, key, key.double(), batch.plan)
