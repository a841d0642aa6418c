"""A step's metadata: the pieces cover every visible key once, whatever the tiles, splits and sharing; fixed buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.kernels.attention import append_kv, attend
from stemcache.kernels.plan import AttentionPlan, SequenceRows, Sharing
from stemcache.kernels.triton_metadata import (
    DIRECT,
    MIN_SPLIT,
    PIECE_WORDS,
    Geometry,
    StepMetadata,
    gpu_sharing,
)
from stemcache.kernels.triton_step import StepBuffers, StepKey

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sequence(chunks: list[int], start: int, stop: int) -> SequenceRows:
    return SequenceRows(np.array(chunks, dtype=np.int32), start, stop)


def sharers(n: int, common: int, *, stop: int | None = None) -> list[SequenceRows]:
    stop = stop or common * 64 + 1
    return [sequence([*range(common), 1000 + i], stop - 1, stop) for i in range(n)]


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    group=st.sampled_from([1, 3, 4, 8, 20, 71]),
    programs=st.sampled_from([1, 16, 264]),
    invariant=st.booleans(),
    max_run=st.integers(1, 30),
    fragmented=st.booleans(),
)
def test_pieces_cover_every_visible_key_once(
    forests: Callable[..., Any],
    seed: int,
    group: int,
    programs: int,
    invariant: bool,
    max_run: int,
    fragmented: bool,
) -> None:
    sequences, _ = forests(seed, chunk_tokens=16, max_run=max_run, fragmented=fragmented)
    sharing = gpu_sharing(group=group, batch_invariant=invariant, split_tokens=64 if invariant else MIN_SPLIT)
    plan = AttentionPlan.build(sequences, chunk_tokens=16, sharing=sharing)
    plan.check()
    geometry = Geometry(2, group, small=16 if group <= 16 else 0, programs=programs)
    metadata = StepMetadata.build(plan, geometry)
    metadata.check(plan)
    pieces = metadata.section("pieces").reshape(-1, PIECE_WORDS)
    assert len(pieces) == metadata.n_large + metadata.n_small
    assert (pieces[: metadata.n_large, 1] <= geometry.large_rows).all()
    assert (pieces[metadata.n_large :, 1] <= geometry.small_rows).all()


def test_check_sees_a_lost_piece_and_a_wrong_partial() -> None:
    plan = AttentionPlan.build(sharers(4, 16), chunk_tokens=64, sharing=gpu_sharing(group=4))
    metadata = StepMetadata.build(plan, Geometry(2, 4))
    metadata.check(plan)
    for section, index, match in (("pieces", 3, "read"), ("parts", 0, "merges"), ("chunks", 0, "another sequence")):
        words = metadata.words.copy()
        damaged = replace(metadata, words=words)
        damaged.section(section)[index] += 64
        with pytest.raises((AssertionError, IndexError), match=match if section != "parts" else None):
            damaged.check(plan)


def test_long_runs_are_split_to_fill_the_machine_and_short_ones_are_not() -> None:
    alone = AttentionPlan.build([sequence(list(range(128)), 8191, 8192)], chunk_tokens=64)
    metadata = StepMetadata.build(alone, Geometry(8, 4, programs=264))
    assert metadata.n_small == 8192 // MIN_SPLIT
    keys = metadata.section("pieces").reshape(-1, PIECE_WORDS)[:, 3]
    assert set(keys.tolist()) == {MIN_SPLIT}
    many = [sequence([*range(k * 20, k * 20 + 16)], 1000, 1001) for k in range(100)]
    plan = AttentionPlan.build(many, chunk_tokens=64)
    metadata = StepMetadata.build(plan, Geometry(8, 4, programs=264))
    assert metadata.n_small == 100
    assert metadata.n_parts == 0
    assert (metadata.section("pieces").reshape(-1, PIECE_WORDS)[:, 5] == DIRECT).all()


def test_the_longest_pieces_come_first() -> None:
    lengths = [100, 900, 300, 5000]
    rows = [sequence(list(range(k * 100, k * 100 + 90)), n - 1, n) for k, n in enumerate(lengths)]
    metadata = StepMetadata.build(AttentionPlan.build(rows, chunk_tokens=64), Geometry(8, 4, programs=64))
    keys = metadata.section("pieces").reshape(-1, PIECE_WORDS)[:, 3]
    assert (np.diff(keys) <= 0).all()


def test_the_rule_shares_what_pays() -> None:
    """Two readers spare half the bytes of a long node; wide groups of many rows over a short one spare nothing."""
    rule = gpu_sharing(group=8)
    assert rule.pays(branches=2, rows=2, tokens=1024)
    assert not rule.pays(branches=2, rows=2, tokens=128)
    assert not rule.pays(branches=2, rows=400, tokens=2048)  # partials of many rows outweigh one read
    assert rule.pays(branches=32, rows=32, tokens=64)
    assert not rule.pays(branches=32, rows=32, tokens=0)
    shared = AttentionPlan.build(sharers(2, 16), chunk_tokens=64, sharing=rule)
    assert [item.shared for item in shared.items] == [True, False, False]
    plain = AttentionPlan.build(sharers(2, 2), chunk_tokens=64, sharing=rule)
    assert [item.shared for item in plain.items] == [False, False]


def test_long_prefills_do_not_join_and_leave_the_rest_to_share() -> None:
    """A prefill's rows fill tiles by themselves; decode rows over the same prefix still read it once."""
    prefix = list(range(40))
    prefill = sequence([*prefix, *range(500, 508)], 2560, 3060)
    decodes = [sequence([*prefix, 600 + i], 2570, 2571) for i in range(5)]
    rule = gpu_sharing(group=4)
    plan = AttentionPlan.build([*decodes[:2], prefill, *decodes[2:]], chunk_tokens=64, sharing=rule)
    plan.check()
    StepMetadata.build(plan, Geometry(2, 4)).check(plan)
    shared = [item for item in plan.items if item.shared]
    assert [len(item.rows) for item in shared] == [5]
    assert (plan.positions[shared[0].rows] == 2570).all()
    nobody = AttentionPlan.build([prefill, prefill], chunk_tokens=64, sharing=rule)
    nobody.check()
    assert not any(item.shared for item in nobody.items)


def test_batch_invariant_cuts_lie_at_fixed_positions() -> None:
    rule = gpu_sharing(group=4, batch_invariant=True, split_tokens=256)
    sequences = [*sharers(5, 10), sequence(list(range(50, 80)), 1700, 1701)]
    plan = AttentionPlan.build(sequences, chunk_tokens=64, sharing=rule)
    metadata = StepMetadata.build(plan, Geometry(2, 4))
    metadata.check(plan)
    assert metadata.n_small == 0, "two tiles round differently"
    assert {item.kv_stop for item in plan.items if item.shared} == {512}
    pieces = metadata.section("pieces").reshape(-1, PIECE_WORDS)
    assert (pieces[:, 4] % 256 == 0).all()
    with pytest.raises(ValueError, match="would cut chunks"):
        AttentionPlan.build(sequences, chunk_tokens=64, sharing=Sharing(split_tokens=100, batch_invariant=True))


def test_slots_beyond_32_bits_are_refused() -> None:
    plan = AttentionPlan.build([sequence([1 << 30], 0, 1)], chunk_tokens=64)
    with pytest.raises(ValueError, match="does not fit 32 bits"):
        StepMetadata.build(plan, Geometry(2, 4))


def test_fixed_buffers_serve_step_after_step(batches: Callable[..., Any]) -> None:
    """The same addresses and the same launches for every step, as a replayed graph has them: growing sequences, one
    that leaves, one that joins, a chunk's roll-over; each step against the reference."""
    pytest.importorskip("triton", reason="the GPU kernels need Triton: pip install 'stemcache[gpu]'")
    from stemcache.kernels.triton_backend import step_key

    key = step_key(2, 1, 16, torch.float32, DEVICE)
    buffers = StepBuffers(key, n_rows=4, n_words=256, n_parts=16)
    address = buffers.step.words.data_ptr()
    rule = replace(gpu_sharing(group=2), fixed_tokens=0, row_tokens=0.0)
    for stops in ([38, 40, 47], [39, 41, 48], [40, 49], [41, 50, 35, 33]):
        sequences = [sequence([5, 7, 10 + i, 20 + i], stop - 1, stop) for i, stop in enumerate(stops)]
        batch = batches(sequences, chunk_tokens=16, kv_heads=1, group=2)
        plan = AttentionPlan.build(sequences, chunk_tokens=16, sharing=rule)
        buffers.load(plan)
        pool, query = batch.pool.to(DEVICE), batch.query.to(DEVICE)
        key_rows, value_rows = torch.randn(2, plan.n_rows, 1, 16, device=DEVICE)
        append_kv(pool, key_rows, value_rows, plan, backend="triton")
        actual = attend(query, pool, plan, scale=0.25, backend="triton")
        expected = attend(query, pool, plan, scale=0.25, backend="reference")
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
        assert plan.derived(("triton step", key), lambda: None) is buffers.step
        assert buffers.step.words.data_ptr() == address
        assert torch.equal(
            buffers.step.words[: len(StepMetadata.build(plan, key.geometry).words)].cpu(),
            torch.from_numpy(StepMetadata.build(plan, key.geometry).words),
        )


def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(batches: Callable[..., Any]) -> None:
    buffers = StepBuffers(StepKey(DEVICE, Geometry(1, 2, programs=4), 16), n_rows=4, n_words=64, n_parts=4)
    before = buffers.step.words.clone()
    plan = AttentionPlan.build(sharers(6, 16), chunk_tokens=64)
    with pytest.raises(ValueError, match=r"6 rows, .* does not fit buffers of 4"):
        buffers.load(plan)
    assert torch.equal(buffers.step.words, before)
    small = AttentionPlan.build([sequence([1], 0, 1)], chunk_tokens=64)
    small.derived(("triton step", buffers.key), lambda: None)
    with pytest.raises(ValueError, match="before its first attention"):
        buffers.attach(small)
