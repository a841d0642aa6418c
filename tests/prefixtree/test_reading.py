"""Values that are read where they lie: theirs as long as the `with` block lasts, whatever happens to the tier."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import lmdb
import pytest

from stemcache.prefixtree.tiers.disk import FILES, MIN_BYTES, DiskTier
from stemcache.prefixtree.tiers.tier import Miss, tier_key

SIZE = 1 << 20


def soon() -> float:
    return time.monotonic() + 60


def key(number: int) -> bytes:
    return tier_key(bytes(32), random.Random(number).randbytes(32))


def value(number: int) -> bytes:
    return random.Random(-number).randbytes(SIZE)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskTier]:
    with closing(DiskTier(tmp_path, MIN_BYTES)) as tier:
        assert tier.store(key(0), value(0), soon()) is None
        yield tier


def test_a_value_is_lent_without_a_copy_and_taken_back(disk: DiskTier) -> None:
    with disk.reading(key(0), soon()) as lent:
        assert isinstance(lent, memoryview)
        assert lent.readonly
        assert lent == value(0)
    with pytest.raises(ValueError, match="released"):
        bytes(lent)
    with disk.reading(key(1), soon()) as lent:
        assert lent is Miss.ABSENT
    with disk.reading(key(0), time.monotonic() - 1) as lent:
        assert lent is Miss.DEADLINE
    stats = disk.stats()
    assert (stats.hits, stats.loaded_bytes) == (1, SIZE)
    assert stats.misses == {Miss.ABSENT: 1, Miss.DEADLINE: 1}


@pytest.mark.parametrize("how", ["deleted", "evicted"])
def test_a_value_that_goes_while_it_is_read_stays_what_it_is(disk: DiskTier, how: str) -> None:
    """The file is so small that its pages are used again and again."""
    with disk.reading(key(0), soon()) as lent:
        assert isinstance(lent, memoryview)
        begin = bytes(lent[: SIZE // 2])
        if how == "deleted":
            assert disk.delete([key(0)])
        kept = [disk.store(key(number), value(number), soon()) is None for number in range(1, 60)]
        assert begin + bytes(lent[SIZE // 2 :]) == value(0)
    assert any(kept)
    assert disk.lookup([key(0)], soon()) == [False]
    assert disk.store(key(60), value(60), soon()) is None, "the pages can be used again"
    disk.check()


def test_a_tier_is_closed_when_nobody_reads_any_more(disk: DiskTier) -> None:
    closing_began, closed = threading.Event(), threading.Event()

    def close() -> None:
        closing_began.set()
        disk.close()
        closed.set()

    with disk.reading(key(0), soon()) as lent:
        assert isinstance(lent, memoryview)
        thread = threading.Thread(target=close)
        thread.start()
        closing_began.wait()
        assert not closed.wait(0.2)
        assert lent == value(0), "an unmapped file would end the process"
    thread.join()
    with disk.reading(key(0), soon()) as lent:
        assert lent is Miss.UNAVAILABLE


def test_an_error_of_the_reader_is_the_readers(disk: DiskTier) -> None:
    """It says nothing of the medium, of which the same kinds of errors are misses."""
    for error in (ValueError("mine"), lmdb.Error("mine"), KeyError("mine")):
        with pytest.raises(type(error), match="mine"), disk.reading(key(0), soon()):
            raise error
    assert disk.stats().trouble is None
    assert disk.load([key(0)], soon()) == [value(0)]


def test_a_file_that_another_process_made_larger_is_mapped_anew(disk: DiskTier, tmp_path: Path) -> None:
    """Not under a reader, who gets a miss for what he asks of the same file meanwhile, and the value that he has."""
    number = next(number for number in range(1, 60) if key(number)[-1] % FILES == key(0)[-1] % FILES)
    with disk.reading(key(0), soon()) as lent:
        other = _in_another_process(tmp_path)
        assert other == 0
        assert disk.load([key(number)], soon()) == [Miss.UNAVAILABLE]
        assert lent == value(0)
    assert disk.load([key(0), key(number)], soon()) == [value(0), value(number)]


def _in_another_process(folder: Path) -> int:
    """Make the file larger than it was and store a value (LMDB forbids opening a file twice in one process)."""
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=_store_in_larger, args=(folder,))
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def _store_in_larger(folder: Path) -> None:
    tier = DiskTier(folder, 4 * MIN_BYTES)
    for number in range(1, 60):
        assert tier.store(key(number), value(number), soon()) is None
    tier.close()
