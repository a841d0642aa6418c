"""Whether the kernels that numba compiles for pairs of bfloat16 numbers run here, and are worth it.

Invariant: asking costs once; where they cannot run, what PyTorch has serves in their place.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from stemcache.kernels import openmp
from stemcache.kernels.cpu_schedule import has_amx

log = logging.getLogger(__name__)


@cache
def can_run() -> bool:
    """Whether there are AVX512_BF16, an OpenMP runtime that can be reached, and numba, which for a new Python or NumPy
    may not be there yet."""
    tells = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if tells is None or not tells() or not openmp.has_team():
        return False
    try:
        import stemcache.kernels.vector_ops  # noqa: F401
    except ImportError as error:
        log.warning("bfloat16 takes up to two times as long without numba, attention up to four: %s", error)
        return False
    return True


def is_preferred() -> bool:
    """Whether they take the place of PyTorch's: not beside AMX, where the two have not been compared
    (`benchmarks/cpu_kernels.py` and `benchmarks/products.py` do)."""
    return not has_amx() and can_run()
