"""The slot allocator: runs, and a random history against a plain set."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.prefixtree.errors import CapacityError, InvariantError
from stemcache.prefixtree.slots import SlotAllocator


def n_runs(slots: list[int]) -> int:
    return sum(1 for left, right in zip([-2, *slots], slots, strict=False) if right != left + 1)


def test_a_new_sequence_is_one_run() -> None:
    slots = SlotAllocator(100).allocate(30)
    assert n_runs(slots) == 1


def test_growth_continues_the_run() -> None:
    allocator = SlotAllocator(100)
    first, second = allocator.allocate(5), allocator.allocate(5)
    for _ in range(10):
        first += allocator.allocate(1, after=first[-1])
        second += allocator.allocate(1, after=second[-1])
        allocator.check()
    assert n_runs(first) == n_runs(second) == 1


def test_growth_across_a_wall_takes_what_is_free_before_it() -> None:
    allocator = SlotAllocator(10)
    allocator.allocate(10)
    allocator.free([2, 3, 7, 8, 9])
    assert allocator.allocate(4, after=1) == [2, 3, 7, 8]
    allocator.check()


def test_without_a_run_that_fits_the_largest_pieces_are_taken() -> None:
    allocator = SlotAllocator(12)
    allocator.allocate(12)
    allocator.free([0, 2, 3, 5, 6, 7, 10, 11])  # runs of 1, 2, 3, 2
    slots = allocator.allocate(5)
    assert n_runs(slots) == 2
    assert {5, 6, 7} <= set(slots)
    allocator.check()


def test_freed_neighbours_join() -> None:
    allocator = SlotAllocator(9)
    allocator.allocate(9)
    for part in ([0, 1, 2], [6, 7, 8], [5, 3, 4]):
        allocator.free(part)
        allocator.check()
    assert n_runs(allocator.allocate(9)) == 1


def test_too_many_slots_is_a_capacity_error_and_changes_nothing() -> None:
    allocator = SlotAllocator(4)
    held = allocator.allocate(1)
    with pytest.raises(CapacityError, match="4 slots needed, 3 of 4 free"):
        allocator.allocate(4)
    allocator.check()
    assert allocator.n_free == 3
    assert not allocator.is_free(held[0])


@pytest.mark.parametrize("wrong", [[0, 0], [1], [-1], [4]])
def test_freeing_what_is_not_held_is_refused_and_changes_nothing(wrong: list[int]) -> None:
    allocator = SlotAllocator(4)
    held = allocator.allocate(4)
    allocator.free([1])
    with pytest.raises(ValueError, match=r"slot -?[0-4]"):
        allocator.free([3, *wrong])
    allocator.check()
    assert allocator.n_free == 1
    assert held == [0, 1, 2, 3]


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SlotAllocator(0)


def test_check_finds_a_lost_slot() -> None:
    allocator = SlotAllocator(4)
    allocator.n_free -= 1
    with pytest.raises(InvariantError, match="n_free"):
        allocator.check()


@settings(max_examples=150)
@given(
    n_slots=st.integers(1, 40),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.integers(0, 1000)), max_size=60),
)
def test_random_histories_against_a_set(n_slots: int, steps: list[tuple[bool, int, int]]) -> None:
    allocator = SlotAllocator(n_slots)
    free = set(range(n_slots))
    held: list[int] = []
    for allocate, n, pick in steps:
        if not allocate:
            returned, held = held[:n], held[n:]
            allocator.free(returned)
            free |= set(returned)
        elif n > len(free):
            with pytest.raises(CapacityError):
                allocator.allocate(n)
        else:
            after = held[pick % len(held)] if held else None
            slots = allocator.allocate(n, after)
            assert len(set(slots)) == len(slots) == n
            assert set(slots) <= free
            if after is not None and n and after + 1 in free:
                assert slots[0] == after + 1
            free -= set(slots)
            held[pick % (len(held) + 1) : 0] = slots
        allocator.check()
        assert {slot for slot in range(n_slots) if allocator.is_free(slot)} == free
        assert allocator.n_free == len(free)
