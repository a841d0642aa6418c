"""Compiled functions on PyTorch's own team of OpenMP threads.

Invariant: when `run` returns, every thread of the team has left the function.

A second team (numba's `prange`, a thread pool) would take processors from the first one's threads, which wait for the
next product spinning. So the function goes to the OpenMP runtime that libtorch_cpu itself is linked to, by the entry
that GCC compiles `#pragma omp parallel` into (libgomp ABI, "Implementing PARALLEL construct"; LLVM's and Intel's
runtimes have it too). With `torch.get_num_threads()` threads it is the calling thread's team as it stands.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch


def run(function: int, argument: int, threads: int) -> None:
    """Call the C function `void f(void *)` at an address once on each of at most so many threads, without the GIL."""
    parallel = _parallel()
    assert parallel is not None, "ask has_team() first"
    parallel(function, argument, threads, 0)


def has_team() -> bool:
    """Whether PyTorch's OpenMP runtime can be reached: so on Linux with the builds of PyPI and conda-forge."""
    return _parallel() is not None


@cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # looked up in what libtorch_cpu is linked to
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel
