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


@cache
def barrier() -> int:
    """The address of `void f(void)`: called by all threads of a team, it returns when all have called it (libgomp ABI,
    "Implementing BARRIER construct")."""
    found = ctypes.cast(_library().GOMP_barrier, ctypes.c_void_p).value
    assert found is not None
    return found


def has_team() -> bool:
    """Whether PyTorch's OpenMP runtime can be reached: so on Linux with the builds of PyPI and conda-forge."""
    return _parallel() is not None


@cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    try:
        parallel = _library().GOMP_parallel  # looked up in what libtorch_cpu is linked to
        barrier()
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
