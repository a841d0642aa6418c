"""The cross-compilation gate: the configurations that need most of each chip, compiled without a GPU.

In a process of its own, since the other tests have Triton interpret the kernels. What has been compiled once is
taken from Triton's cache. `make kernel-gate` compiles every configuration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need Triton: pip install 'stemcache[gpu]'")

MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@pytest.mark.parametrize("arch", MATRIX)
def test_configurations_compile_within_the_chip(arch: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "stemcache.kernels.triton_compile", "--some", "--json", "--arch", str(arch)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, [r for r in results if r["faults"]] or run.stderr[-2000:]
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
