"""What of the kernel benchmark runs without a GPU: its workloads, the bytes it counts, its peers' adapters."""

from __future__ import annotations

from typing import Any

import kernel_peers
import kernel_workloads as workloads
import numpy as np
import pytest
import torch
from kernel_peers import Inputs, UnsupportedError
from kernel_workloads import Workload

import kernels as benchmark
from stemcache.kernels.plan import AttentionPlan
from stemcache.kernels.triton_metadata import Geometry, StepMetadata, gpu_sharing


def small(sequences: Any, *, q_heads: int = 4, kv_heads: int = 2, head_dim: int = 16) -> Workload:
    return Workload("X", "small", q_heads, kv_heads, head_dim, "float32", sequences)


def test_every_block_is_there_and_each_comes_early() -> None:
    found = workloads.blocks()
    assert {w.block for w in found} == set("ABCDEFGH")
    assert {w.block for w in found[:8]} == set("ABCDEFGH")
    assert len({w.label for w in found}) == len(found)
    for w in found[:8]:
        plan = benchmark.plan_of(w)
        group = w.q_heads // w.kv_heads
        StepMetadata.build(plan, Geometry(w.kv_heads, group, small=16 if group <= 16 else 0))
        assert any(item.shared for item in plan.items) == (w.block != "C")
        assert not any(item.shared for item in benchmark.plan_of(w, benchmark.unshared()).items)


def test_bytes_and_operations_are_those_of_the_formula() -> None:
    """(shared + B * private) * kv_heads * 2d * 2 + 2 * B * q_heads * d * 2, and 4 * d * q_heads * B * length."""
    w = Workload("X", "", 32, 8, 128, "bfloat16", workloads.flat(32, 1024, 100))
    assert w.bytes_needed() == (1024 + 32 * 100) * 8 * 256 * 2 + 2 * 32 * 32 * 128 * 2
    assert w.operations() == 4 * 128 * 32 * 32 * 1124
    assert w.shared_tokens() == 1024
    prefill = Workload("X", "", 1, 1, 16, "bfloat16", workloads.flat(1, 0, 10, new=10))
    assert prefill.operations() == 4 * 16 * 55


def test_trees_have_the_nodes_they_are_said_to_have() -> None:
    sequences = workloads.tree([2, 4, 8], [128, 64, 32])
    assert [s.stop for s in sequences] == [224] * 8
    for depth, nodes in enumerate([2, 2, 4, 8]):
        assert len({s.chunks[depth] for s in sequences}) == nodes
    assert Workload("X", "", 1, 1, 16, "float32", sequences).shared_tokens() == 0


def test_sequences_come_and_go() -> None:
    steps = list(workloads.dynamics(batch=4, shared=128, steps=40, every=8))
    assert [len(step) for step in steps] == [4] * 40
    for step in steps:
        AttentionPlan.build(step, chunk_tokens=64, sharing=gpu_sharing(group=4)).check()
        own = [tuple(s.chunks[2:].tolist()) for s in step]
        assert len(set(own)) == 4
        assert all((s.chunks[:2] == [0, 1]).all() for s in step)
    assert benchmark.measure_dynamics(steps=20)["most_words"] > 0


@pytest.mark.parametrize("name", ["sdpa", "hydragen"])
def test_peers_compute_the_same(name: str) -> None:
    inputs = benchmark.inputs_of(small(workloads.flat(3, 128, 70)), "cpu")
    output = getattr(kernel_peers, name)(inputs)()
    assert benchmark.error_of(output, inputs) < 1e-5
    assert benchmark.error_of(output + 0.1, inputs) > 1e-3, "the check of errors sees none"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_takes_prefills_and_trees() -> None:
    """Uncompiled, which on a CPU gives the same numbers without compiling for each shape."""
    for sequences in (workloads.mixed(1, 20, 2, 64, 70), workloads.tree([2, 4], [64, 30])):
        inputs = benchmark.inputs_of(small(sequences), "cpu")
        assert benchmark.error_of(kernel_peers.flex(inputs)(), inputs) < 1e-5


def test_peers_say_what_they_cannot_do() -> None:
    prefill = benchmark.inputs_of(small(workloads.mixed(1, 20, 2, 64, 70)), "cpu")
    with pytest.raises(UnsupportedError, match="decode rows"):
        kernel_peers.sdpa(prefill)
    alone = benchmark.inputs_of(small(workloads.flat(2, 0, 70)), "cpu")
    with pytest.raises(UnsupportedError, match="nothing shared"):
        kernel_peers.hydragen(alone)


@pytest.mark.parametrize("shared", [False, True])
def test_pages_hold_the_pool(shared: bool) -> None:
    inputs: Inputs = benchmark.inputs_of(small(workloads.flat(3, 128, 70)), "cpu")
    pages, tables = inputs.pages(shared=shared)
    assert len(pages) == (2 + 3 * 2 if shared else 3 * 4)
    for s, table in zip(inputs.workload.sequences, tables, strict=True):
        expected = inputs.pool[:, :, torch.from_numpy(s.chunks.astype(np.int64))].permute(2, 0, 1, 3, 4)
        assert torch.equal(pages[table], expected)


def test_our_kernel_is_run_as_the_benchmark_runs_it() -> None:
    pytest.importorskip("triton", reason="the GPU kernels need Triton: pip install 'stemcache[gpu]'")
    if torch.cuda.is_available():
        pytest.skip("tests of the kernels on a GPU are in test_triton.py")
    inputs = benchmark.inputs_of(small(workloads.flat(3, 128, 10), q_heads=2, kv_heads=1), "cpu")
    plan = benchmark.plan_of(inputs.workload, gpu_sharing(group=1))
    for one_launch in (True, False):
        output = benchmark.ours(inputs, plan, one_launch=one_launch)()
        assert benchmark.error_of(output, inputs) < 2e-6
