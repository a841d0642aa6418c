"""The cross-compilation gate: the configurations that need most of each chip, compiled without a GPU.

In a process of its own, since the other tests have Triton interpret the kernels. What has been compiled once is
taken from Triton's cache. `make kernel-gate` compiles every configuration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.sweep

pytest.importorskip("triton", reason="the GPU kernels need Triton: pip install 'stemcache[gpu]'")

MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


NOT_INTERPRETED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """All architectures in one process: it takes longer to import torch than to compile for one."""
    archs = [str(arch) for arch in MATRIX]
    command = [sys.executable, "-m", "stemcache.kernels.triton_compile", "--some", "--json", "--arch", *archs]
    run = subprocess.run(command, capture_output=True, text=True, env=NOT_INTERPRETED, check=False)
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, [r for r in results if r["faults"]] or run.stderr[-2000:]
    return results


@pytest.mark.parametrize("arch", MATRIX)
def test_configurations_compile_within_the_chip(compiled: list[dict[str, Any]], arch: int) -> None:
    results = [result for result in compiled if result["configuration"].startswith(f"sm_{arch} ")]
    assert len(results) == 3
    for result in results:
        assert result["stack"] == 0, result
        assert MATRIX[arch] in result["matrix"], result
        assert result["registers"] <= 255


def test_faults_are_found() -> None:
    from stemcache.kernels.triton_compile import Configuration, Resources

    configuration = Configuration(80, 128)
    assert Resources(("mma.sync",), 100_000, 200, 0).faults(configuration) == []
    assert "spilled" in Resources(("mma.sync",), 100_000, 255, 8).faults(configuration)[0]
    assert "matrix" in Resources((), 100_000, 200, 0).faults(configuration)[0]
    assert "shared" in Resources(("mma.sync",), 200_000, 200, 0).faults(configuration)[0]
    assert Resources((), 100_000, 200, 0).faults(Configuration(80, 128, dtype=torch.float32)) == []


def test_where_the_kernels_cannot_run_the_error_says_what_to_do() -> None:
    """In a process that does not interpret kernels, first without Triton and then with it; the CPU's backend goes on
    working."""
    program = """
import sys
import numpy as np, torch
from stemcache.kernels.attention import attend
from stemcache.kernels.plan import AttentionPlan, SequenceRows
plan = AttentionPlan.build([SequenceRows(np.zeros(1, dtype=np.int32), 0, 1)], chunk_tokens=16)
query, pool = torch.zeros(1, 2, 16), torch.zeros(2, 1, 1, 16, 16)
assert "triton" not in sys.modules
sys.modules["triton"] = None  # as if it were not installed
for _ in range(2):
    try:
        attend(query, pool, plan, scale=1.0, backend="triton")
    except ValueError as error:
        print(error)
    assert attend(query, pool, plan, scale=1.0).shape == query.shape
    sys.modules.pop("triton", None)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=NOT_INTERPRETED, check=True
    )
    without_triton, without_gpu = run.stdout.splitlines()
    assert "pip install 'stemcache[gpu]'" in without_triton
    assert "run on a GPU, not on cpu: use backend='cpu'" in without_gpu
