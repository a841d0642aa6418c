"""Memory whose pages come while it is used."""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from stemcache.prefixtree import host_memory
from stemcache.prefixtree.errors import CapacityError
from stemcache.prefixtree.host_memory import PIECE, SMALL, zeroed
from stemcache.prefixtree.layout import KVLayout
from stemcache.prefixtree.pool import KVPool

LARGE = SMALL + PIECE // 2 + 4096
"""Bytes whose last piece is not a whole one."""
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such call: memory is zeroed at once")


def populating() -> bool:
    return any(thread.name == "stemcache-pages" for thread in threading.enumerate())


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("n_bytes", [1, SMALL - 1, SMALL, LARGE])
def test_it_is_zero_and_of_its_size(n_bytes: int) -> None:
    memory = zeroed(n_bytes)
    assert memory.shape == (n_bytes,)
    assert memory.dtype == torch.uint8
    assert not memory.any()


@linux
def test_pages_come_without_being_touched() -> None:
    assert until(lambda: not populating())
    before = resident()
    memory = zeroed(LARGE)
    assert until(lambda: resident() - before > 0.9 * LARGE), (resident() - before, LARGE)
    assert memory.numel() == LARGE


def test_what_is_written_meanwhile_stays() -> None:
    """Writes race with the thread over the same pieces; each time another one is ahead."""
    rng = random.Random(0)
    for _ in range(5):
        memory = zeroed(LARGE)
        written = {rng.randrange(LARGE): rng.randrange(1, 256) for _ in range(20_000)}
        for place, value in written.items():
            memory[place] = value
        assert until(lambda: not populating())
        places = torch.tensor(sorted(written))
        assert memory[places].tolist() == [written[place] for place in sorted(written)]
        memory[places] = 0
        assert not memory.any()


@linux
def test_memory_that_is_dropped_meanwhile_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread does not keep what nobody else has any more, and it ends."""
    monkeypatch.setattr(host_memory, "PIECE", 0)  # so that it never comes to an end by itself
    before = resident()
    memory = zeroed(LARGE)
    assert populating()
    view = memory[:SMALL]
    del memory
    gc.collect()
    view[:] = 1  # a view keeps all of it
    assert populating()
    del view
    assert until(lambda: not populating(), 10)
    assert until(lambda: resident() - before < SMALL)


@linux
def test_a_system_that_refuses_gives_pages_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_POPULATE_WRITE", 9999)  # as a Linux before 5.14 sees it
    memory = zeroed(LARGE)
    assert until(lambda: not populating())
    memory[LARGE - 1] = 7
    assert int(memory.sum()) == 7


@pytest.mark.parametrize("n_bytes", [2**42, 2**60, 2**64])
def test_more_than_the_system_has_is_an_error(n_bytes: int) -> None:
    with pytest.raises((MemoryError, RuntimeError)):
        zeroed(n_bytes)


@pytest.fixture
def tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, str | None], None]:
    """A system that says of its memory what a test wants; None: it has no such file."""

    def write(meminfo: str | None, limit: str | None) -> None:
        files = tmp_path / "meminfo", tmp_path / "memory.max"
        for file, text in zip(files, (meminfo, limit), strict=True):
            file.unlink(missing_ok=True)
            if text is not None:
                file.write_text(text)
        monkeypatch.setattr(host_memory, "_MEMINFO", files[0])
        monkeypatch.setattr(host_memory, "_LIMITS", (tmp_path / "none", files[1]))

    return write


MEMINFO = (
    "MemTotal:       24683920 kB\nMemAvailable:     {available} kB\nSwapFree:    1024 kB\nHugePages_Total:       0\n"
)


@pytest.mark.parametrize(
    ("meminfo", "limit", "expected"),
    [
        (MEMINFO.format(available=70_000), None, 71_024 << 10),
        (MEMINFO.format(available=70_000), "max\n", 71_024 << 10),
        (MEMINFO.format(available=70_000), "1048576\n", 1 << 20),
        (MEMINFO.format(available=70_000), str(2**63 - 4096), 71_024 << 10),
        ("MemTotal: 5 kB\n", None, sys.maxsize),
        (None, "1048576\n", 1 << 20),
        (None, None, sys.maxsize),
    ],
)
def test_what_is_left(tells: Callable[..., None], meminfo: str | None, limit: str | None, expected: int) -> None:
    tells(meminfo, limit)
    assert host_memory.available() == expected


@linux
def test_a_pool_that_does_not_fit_says_what_is_left(tells: Callable[..., None]) -> None:
    """Before its pages are asked for, when the system would end the process."""
    layout = KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="float32", chunk_tokens=64)
    n_chunks = layout.chunks_in(LARGE)
    tells(MEMINFO.format(available=40 << 10), None)
    with pytest.raises(CapacityError, match="41 MiB are left of the memory, and 65 are asked for"):
        KVPool(layout, n_chunks)
    tells(MEMINFO.format(available=80 << 10), None)
    assert KVPool(layout, n_chunks).n_chunks == n_chunks
