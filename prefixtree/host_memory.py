"""Zeroed host memory whose pages the system gives while other work goes on.

Invariant: a byte reads as zero until somebody writes it, and as what was written from then on, whether its page had
been given by then or not.

Zeros that are written by hand make a start wait for every page of the pool: 0.3 s a GiB, and 1.5 to 2.3 s a GiB in a
virtual machine whose host has to find the memory first (measured on two cores of a Zen 4). A page that the system gives
is zero anyhow, so it only has to be asked for; Linux does so by `madvise(MADV_POPULATE_WRITE)` (5.14, madvise(2)),
which changes no byte. Rejected: waiting for each page's first use, which moves the cost into requests, and lets a pool
that the machine has no room for fail in the middle of one; huge pages, which took 2.2 to 3.2 s a GiB there, and made
no step faster.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import torch

PIECE = 512 << 10
"""Bytes asked for at once. The process's memory map is locked meanwhile (0.2 to 1.2 ms)."""
SMALL = 64 << 20
"""Bytes below which memory is zeroed at once: that takes less than 0.1 s."""
_MEMINFO = Path("/proc/meminfo")
_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Of the control group (a container's), versions 2 and 1; where there is none, no such number is in them."""
_POPULATE_WRITE = 23  # linux/mman.h


def zeroed(n_bytes: int) -> torch.Tensor:
    """Return `n_bytes` zeros, uint8 `[n_bytes]`. The memory is given back when nothing refers to the tensor any more.

    Raises:
        MemoryError, RuntimeError: so much is not there. (Linux promises it all the same, and ends the process when it
            asks for the last pages.)
    """
    if n_bytes < SMALL or sys.platform != "linux":
        return torch.zeros(n_bytes, dtype=torch.uint8)
    if n_bytes > (left := available()):
        raise MemoryError(f"{left >> 20:,} MiB are left of the memory, and {-(-n_bytes >> 20):,} are asked for")
    try:
        mapping = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(str(error)) from error
    tensor = torch.frombuffer(mapping, dtype=torch.uint8)
    name = "stemcache-pages"
    threading.Thread(target=_populate, args=(weakref.ref(mapping), tensor.data_ptr()), name=name, daemon=True).start()
    return tensor


def available() -> int:
    """Bytes that the system can still give, as far as it tells: free, or held only as a cache, or in its swap space;
    no more than its control group may have. Without a limit, or on a system that says nothing, a very large number."""
    left = sys.maxsize
    with suppress(OSError, ValueError, KeyError):
        lines = (line.split() for line in _MEMINFO.read_text().splitlines())
        kib = {name.rstrip(":"): int(number) for name, number, *_ in lines}
        left = (kib["MemAvailable"] + kib["SwapFree"]) << 10
    for file in _LIMITS:
        with suppress(OSError, ValueError):
            left = min(left, int(file.read_text()))
    return left


def _populate(mapping: weakref.ref[mmap.mmap], address: int) -> None:
    """Ask for one piece after the other, as long as the mapping is used; at the lowest priority."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # mmap.madvise would hold Python's lock meanwhile
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with suppress(OSError):  # not everywhere may a thread lower its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    offset = 0
    while (memory := mapping()) is not None and offset < len(memory):
        if madvise(address + offset, min(PIECE, len(memory) - offset), _POPULATE_WRITE):
            return  # an older Linux (EINVAL), or no memory is left: pages come with their first use, as ever
        offset += PIECE
        del memory  # or it would live until the next piece has been asked for
