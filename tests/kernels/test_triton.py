"""The Triton kernels against the float64 reference: on a GPU where there is one, else under Triton's interpreter.

The interpreter runs programs one after another with numpy: it shows wrong arithmetic, masks and addresses, and shows no
races. `tests/conftest.py` turns it on before anything imports Triton. Sizes are small: a tile takes 10 to 30 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stemcache.kernels.attention import append_kv, attend
from stemcache.kernels.plan import AttentionPlan, SequenceRows
from stemcache.kernels.quantised import QuantisedLayer, quantise
from stemcache.kernels.triton_metadata import gpu_sharing

pytestmark = pytest.mark.sweep

pytest.importorskip("triton", reason="the GPU kernels need Triton: pip install 'stemcache[gpu]'")

# As in test_attention.py: relative to the largest output.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sequence(chunks: list[int], start: int, stop: int) -> SequenceRows:
    return SequenceRows(np.array(chunks, dtype=np.int32), start, stop)


def small_forest(roots: int = 2, *, fragmented: bool = False) -> list[SequenceRows]:
    """Nested shared nodes over 16-token chunks: decode rows, a chunked prefill, a fresh prompt, a row that begins
    exactly at a shared node's end, all in mixed order."""
    ids = [int(i) for i in (np.random.default_rng(roots).permutation(120) if fragmented else np.arange(120))]
    take = iter(ids)

    def run(n: int) -> list[int]:
        return [next(take) for _ in range(n)]

    sequences = [sequence(run(2), 0, 19)]
    for root in range(roots):
        trunk = run(4 + root)
        branch = trunk + run(3)
        n = len(branch) * 16
        sequences += [
            sequence(branch + run(1), n, n + 1),
            sequence(trunk + run(2), len(trunk) * 16 + 9, len(trunk) * 16 + 26),
            sequence(branch + run(2), n + 17, n + 18),
            sequence(branch + run(1), n + 5, n + 10),
        ]
    return sequences[::2] + sequences[1::2]


def on_gpu(batch: Any, sharing: Any = None) -> Any:
    """The batch on the test's device, planned by the GPU's rule, which shares these short nodes where the CPU's does
    not."""
    size = batch.pool.shape[3]
    group = batch.query.shape[1] // batch.pool.shape[1]
    sharing = sharing or replace(gpu_sharing(group=group), fixed_tokens=0, row_tokens=0.0, max_rows=None)
    plan = AttentionPlan.build(batch.sequences, chunk_tokens=size, sharing=sharing)
    plan.check()
    return replace(batch, plan=plan, pool=batch.pool.to(DEVICE), query=batch.query.to(DEVICE))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert not actual.isnan().any(), "NaN leaked from a free chunk or an unseen key"
    return float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())


def assert_matches(batch: Any, *, tolerance: float | None = None, **options: Any) -> None:
    expected = attend(
        batch.query.float(), batch.pool.float(), batch.plan, scale=batch.scale, backend="reference", **options
    )
    actual = attend(batch.query, batch.pool, batch.plan, scale=batch.scale, backend="triton", **options)
    assert actual.dtype == batch.query.dtype
    error = relative_error(actual, expected)
    assert error <= (tolerance or TOLERANCE[batch.query.dtype]), f"relative error {error:.1e}"


@pytest.mark.parametrize(("dtype", "group"), [(torch.float32, 1), (torch.float16, 3), (torch.bfloat16, 8)])
def test_forests(batches: Callable[..., Any], dtype: torch.dtype, group: int) -> None:
    sequences = small_forest(roots=1 + group % 2, fragmented=group > 1)
    batch = on_gpu(batches(sequences, chunk_tokens=16, kv_heads=1, group=group, head_dim=32, dtype=dtype, seed=group))
    assert any(item.shared for item in batch.plan.items)
    assert_matches(batch)


@pytest.mark.parametrize("seed", range(2))
def test_random_forests(forests: Callable[..., Any], batches: Callable[..., Any], seed: int) -> None:
    """The generator of the CPU's tests, cut to decode rows and short prefills by its small depth."""
    sequences, _ = forests(seed, chunk_tokens=16, roots=2, depth=2, max_run=3, fragmented=seed > 0)
    batch = on_gpu(batches(sequences, chunk_tokens=16, kv_heads=1, group=4, head_dim=16, dtype=torch.float16))
    assert_matches(batch)


@pytest.mark.parametrize("window", [1, 5, 16, 40, 500])
def test_windows(batches: Callable[..., Any], window: int) -> None:
    batch = on_gpu(batches(small_forest(1), chunk_tokens=16, kv_heads=1, group=2, head_dim=16))
    assert_matches(batch, window=window)


def test_softcap_and_sinks(batches: Callable[..., Any]) -> None:
    """Sinks in both places: rows that are merged, and the fresh prompt, whose one piece writes the output itself."""
    batch = on_gpu(batches(small_forest(1), chunk_tokens=16, kv_heads=1, group=3, head_dim=16))
    sinks = torch.tensor([0.3, -2.0, 4.0], device=DEVICE)
    assert_matches(batch, softcap=3.0)
    assert_matches(batch, sinks=sinks)
    assert_matches(batch, softcap=2.0, sinks=sinks, window=30)


@pytest.mark.parametrize(
    ("group", "head_dim", "chunk_tokens"), [(3, 96, 64), (5, 40, 32), (20, 128, 128), (71, 64, 16), (2, 256, 256)]
)
def test_shapes(batches: Callable[..., Any], group: int, head_dim: int, chunk_tokens: int) -> None:
    """Widths that are no power of two, groups wider than a tile, chunks of several key tiles."""
    shared = [3]
    stop = chunk_tokens + 7
    sequences = [sequence([*shared, 5 + i], stop - 1 - i, stop) for i in range(2)]
    batch = on_gpu(
        batches(sequences, chunk_tokens=chunk_tokens, kv_heads=1, group=group, head_dim=head_dim, dtype=torch.float16)
    )
    assert_matches(batch)


def test_large_scores_do_not_overflow(batches: Callable[..., Any]) -> None:
    batch = on_gpu(batches(small_forest(1), chunk_tokens=16, kv_heads=1, group=2, head_dim=16))
    batch.query.mul_(200.0)
    # a score near 1000, times log2(e), is rounded to 6e-5, and so is the logarithm of its weight
    assert_matches(batch, tolerance=1e-4)
    assert_matches(batch, tolerance=1e-4, sinks=torch.full((2,), 50.0, device=DEVICE))


def test_tails_beyond_a_sequence_may_hold_nan(batches: Callable[..., Any]) -> None:
    """A sequence's last chunk beyond `stop` was never written by it: another's remains, or NaN."""
    batch = batches([sequence([1, 4], 0, 20), sequence([1, 7], 25, 26)], chunk_tokens=16, kv_heads=1, group=2)
    batch.pool[:, :, 4, 4:] = float("nan")
    batch.pool[:, :, 7, 10:] = float("nan")
    on_device = on_gpu(batch)
    actual = attend(on_device.query, on_device.pool, on_device.plan, scale=batch.scale, backend="triton")
    expected = attend(batch.query, batch.pool.nan_to_num(0.0), batch.plan, scale=batch.scale, backend="reference")
    assert relative_error(actual.cpu(), expected) <= TOLERANCE[torch.float32]


def test_a_transposed_query_and_a_layer_of_a_larger_pool(batches: Callable[..., Any]) -> None:
    sequences = [sequence([1, 2, 3 + i], 40 + i, 41 + i) for i in range(3)]
    batch = on_gpu(batches(sequences, chunk_tokens=16, kv_heads=2, group=2, head_dim=16))
    pool = torch.stack([torch.zeros_like(batch.pool), batch.pool])
    query = batch.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert not query.is_contiguous()
    expected = attend(batch.query, batch.pool, batch.plan, scale=batch.scale, backend="triton")
    assert torch.equal(attend(query, pool[1], batch.plan, scale=batch.scale, backend="triton"), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_reads(batches: Callable[..., Any], bits: int) -> None:
    """Against float64 attention over the dequantised values: nothing is lost beyond quantising itself."""
    batch = on_gpu(batches(small_forest(1), chunk_tokens=16, kv_heads=1, group=4, head_dim=48, dtype=torch.float16))
    layer = quantise(batch.pool, bits)
    expected = attend(batch.query.float(), layer, batch.plan, scale=batch.scale, backend="reference")
    actual = attend(batch.query, layer, batch.plan, scale=batch.scale, backend="triton")
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[torch.float16], f"relative error {error:.1e}"


def test_batch_invariant_rows_do_not_depend_on_the_batch(batches: Callable[..., Any]) -> None:
    """Each sequence alone, in a batch that shares, and without some neighbours: the same bits."""
    sequences = [s for s in small_forest(2) if s.stop - s.start < 10]
    batch = batches(sequences, chunk_tokens=16, kv_heads=1, group=2, head_dim=32, dtype=torch.float16)
    sharing = replace(gpu_sharing(group=2, batch_invariant=True, split_tokens=32), fixed_tokens=0, row_tokens=0.0)

    def rows(members: list[int]) -> dict[int, Tensor]:
        chosen = [batch.sequences[i] for i in members]
        counts = [s.stop - s.start for s in batch.sequences]
        query = torch.cat([batch.query.split(counts)[i] for i in members])
        part = on_gpu(replace(batch, sequences=chosen, query=query), sharing)
        output = attend(part.query, part.pool, part.plan, scale=batch.scale, backend="triton")
        return dict(zip(members, output.split([counts[i] for i in members]), strict=True))

    everyone = rows(list(range(len(batch.sequences))))
    for members in ([2], [5, 1], [3, 0]):
        for i, alone in rows(members).items():
            assert torch.equal(alone, everyone[i]), f"sequence {i} in the batch {members}"


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_append(batches: Callable[..., Any], bits: int) -> None:
    """The Triton kernel writes what the plain form writes, quantised or not, and nothing else."""
    sequences = [sequence([4, 5], 3, 30), sequence([4, 1], 16, 18), sequence([3], 0, 1)]
    batch = on_gpu(batches(sequences, chunk_tokens=16, kv_heads=2, head_dim=24, dtype=torch.float16))
    key, value = torch.randn(2, 2, batch.plan.n_rows, 24, device=DEVICE).half().transpose(1, 2)
    value[3] = 0.0  # a token of zeros has no scale
    expected = batch.pool.clone()
    append_kv(expected, key, value, batch.plan, backend="cpu" if DEVICE == "cpu" else "reference")
    if bits == 16:
        append_kv(batch.pool, key, value, batch.plan, backend="triton")
        assert torch.equal(batch.pool.nan_to_num(9.0), expected.nan_to_num(9.0))
        return
    layer, quantised = quantise(batch.pool, bits), quantise(expected, bits)
    append_kv(layer, key, value, batch.plan, backend="triton")
    torch.testing.assert_close(layer.scales, quantised.scales, rtol=1e-6, atol=0.0, equal_nan=True)
    difference = (nibbles(layer).int() - nibbles(quantised).int()).abs()
    assert difference.max() <= 1, "a code is off by more than a rounding"
    assert difference.float().mean() < 1e-3


def nibbles(layer: QuantisedLayer) -> Tensor:
    return layer.codes if layer.bits == 8 else torch.stack([layer.codes & 15, layer.codes >> 4])


def test_what_cannot_be_served_is_refused(batches: Callable[..., Any]) -> None:
    batch = batches([sequence([1], 0, 5)], chunk_tokens=64, head_dim=16)
    layer = quantise(batch.pool, 8)
    with pytest.raises(ValueError, match="'triton' and 'reference' only"):
        attend(batch.query, layer, batch.plan, scale=1.0, backend="cpu")
    with pytest.raises(ValueError, match="only backend='triton' appends"):
        append_kv(layer, torch.zeros(5, 2, 16), torch.zeros(5, 2, 16), batch.plan)
    with pytest.raises(ValueError, match="8 or 4 bits"):
        quantise(batch.pool, 3)
    wide = batches([sequence([1], 0, 5)], chunk_tokens=64, head_dim=272)
    with pytest.raises(ValueError, match="up to 256 values"):
        attend(wide.query, wide.pool, wide.plan, scale=1.0, backend="triton")
