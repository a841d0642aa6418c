"""The mark of tests that need the compiled bfloat16 kernels."""

import pytest

from stemcache.kernels import bfloat16_pairs

needs_pairs = pytest.mark.skipif(
    not bfloat16_pairs.can_run(), reason="needs AVX512_BF16, numba and an OpenMP runtime that can be reached"
)
