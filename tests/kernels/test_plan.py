"""The plan: items cover every visible key once, sharing follows the chunk ids, the cost rule decides what to share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.kernels.plan import AttentionPlan, SequenceRows


def sequence(chunks: list[int], start: int, stop: int) -> SequenceRows:
    return SequenceRows(np.array(chunks, dtype=np.int32), start, stop)


def shared_runs(plan: AttentionPlan) -> dict[tuple[int, ...], tuple[int, ...]]:
    return {tuple(i.chunks.tolist()): tuple(sorted(i.rows.tolist())) for i in plan.items if i.shared}


@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**32 - 1),
    roots=st.integers(1, 4),
    depth=st.integers(1, 5),
    max_run=st.integers(1, 30),
    chunk_tokens=st.sampled_from([16, 64]),
    fragmented=st.booleans(),
)
def test_every_visible_key_is_covered_once(forests: Callable[..., Any], seed: int, **shape: Any) -> None:
    sequences, _ = forests(seed, **shape)
    plan = AttentionPlan.build(sequences, chunk_tokens=shape["chunk_tokens"])
    plan.check()
    assert plan.n_rows == sum(s.stop - s.start for s in sequences)


@settings(max_examples=60)
@given(st.data())
def test_any_prefix_relation_is_planned_right(data: st.DataObject) -> None:
    """Paths of a small tree, equal ones included: ends at shared nodes, starts inside shared runs, duplicates."""
    path = st.lists(st.integers(0, 2), min_size=1, max_size=5)
    node = st.integers(1, 20)
    run: dict[tuple[int, ...], list[int]] = {}
    sequences = []
    for steps in data.draw(st.lists(path, min_size=1, max_size=6)):
        chunks: list[int] = []
        for k in range(1, len(steps) + 1):
            key = tuple(steps[:k])
            if key not in run:
                first = 1000 * len(run)
                run[key] = list(range(first, first + data.draw(node)))
            chunks += run[key]
        start = data.draw(st.integers(0, len(chunks) * 16 - 1))
        sequences.append(sequence(chunks, start, data.draw(st.integers(start + 1, len(chunks) * 16))))
    AttentionPlan.build(sequences, chunk_tokens=16).check()


def test_check_sees_a_lost_and_a_doubled_item() -> None:
    shared = list(range(8))
    plan = AttentionPlan.build([sequence([*shared, 10 + i], 520, 521) for i in range(3)], chunk_tokens=64)
    plan.check()
    with pytest.raises(AssertionError, match="never read"):
        replace(plan, items=plan.items[:-1]).check()
    with pytest.raises(AssertionError, match="read twice"):
        replace(plan, items=(*plan.items, plan.items[0])).check()
    wrong = replace(plan.items[0], chunks=plan.items[0].chunks[::-1])
    with pytest.raises(AssertionError, match="another sequence"):
        replace(plan, items=(wrong, *plan.items[1:])).check()


def test_nested_nodes_of_two_roots_are_found() -> None:
    root, left, right, other = [list(range(a, a + 20)) for a in (0, 100, 200, 300)]
    sequences = [
        sequence([*root, *left, 900], 2560, 2561),
        sequence([*other, 901], 1280, 1281),
        sequence([*root, *right, 902], 2560, 2561),
        sequence([*root, *left, 903], 2560, 2562),
        sequence([*other, 904], 1280, 1281),
        sequence([*root, *right], 2559, 2560),  # its last token is the node's last: 39 whole chunks before it
    ]
    plan = AttentionPlan.build(sequences, chunk_tokens=64)
    plan.check()
    assert shared_runs(plan) == {
        tuple(root): (0, 2, 3, 4, 6),
        tuple(left): (0, 3, 4),
        tuple(right[:19]): (2, 6),
        tuple(other): (1, 5),
    }


def test_positions_and_slots_follow_the_sequences() -> None:
    plan = AttentionPlan.build([sequence([7, 3], 62, 66), sequence([5], 0, 2)], chunk_tokens=64)
    assert plan.positions.tolist() == [62, 63, 64, 65, 0, 1]
    assert plan.token_slots.tolist() == [7 * 64 + 62, 7 * 64 + 63, 3 * 64, 3 * 64 + 1, 5 * 64, 5 * 64 + 1]


def test_a_short_node_is_left_to_its_readers() -> None:
    """Two readers of 64 common tokens read them twice; eight readers, or a longer run, share them."""

    def shares(readers: int, common: int) -> bool:
        stop = common * 64 + 1
        run = list(range(common))
        plan = AttentionPlan.build([sequence([*run, 100 + i], stop - 1, stop) for i in range(readers)], chunk_tokens=64)
        plan.check()
        return bool(shared_runs(plan))

    assert not shares(2, 1)
    assert shares(8, 1)
    assert shares(2, 16)


def test_a_short_root_over_shared_branches_counts_branches_not_sequences() -> None:
    left, right = list(range(10, 30)), list(range(40, 60))
    sequences = [sequence([0, *branch, 100 + i], 1344, 1345) for i, branch in enumerate([left, right] * 8)]
    plan = AttentionPlan.build(sequences, chunk_tokens=64)
    plan.check()
    assert set(shared_runs(plan)) == {(0, *left), (0, *right)}


@pytest.mark.parametrize(
    ("chunks", "start", "stop", "match"),
    [([1], 0, 65, "do not reach"), ([-1], 0, 3, "negative"), ([1], 4, 4, "start < stop"), ([1], -1, 4, "0 <= start")],
)
def test_bad_sequences_are_refused(chunks: list[int], start: int, stop: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AttentionPlan.build([sequence(chunks, start, stop)], chunk_tokens=64)


def test_bad_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        AttentionPlan.build([], chunk_tokens=64)
    with pytest.raises(ValueError, match="power of two"):
        AttentionPlan.build([sequence([1], 0, 1)], chunk_tokens=48)
