"""What a step has freed is used again: page faults of a process that takes and frees what a prefill does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from stemcache.engine.freed_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for round in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    some = [np.ones(5 << 20, np.float32) for _ in range(3)]
    del some
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    """Of the last round, which takes 60 MB. A page has 4 KiB."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run([sys.executable, "-c", PROGRAM, mode], env=plain, capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other allocators")
def test_freed_memory_is_kept() -> None:
    assert faults("kept") < 1_000 < faults("as delivered")
