"""An engine over the Triton kernels and the buffers of captured graphs: the tokens are still transformers' own.

On a GPU natively, with captured graphs; else under Triton's interpreter, where everything but the capture runs.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import equivalence
import numpy as np
import pytest
import torch
from equivalence import CHUNK, VOCABULARY, Reference, Tally, random_models, run_workload

from stemcache import Engine, SamplingParams
from stemcache.engine import decode_graphs
from stemcache.engine import engine as engine_module
from stemcache.engine.decode_graphs import batch_sizes
from stemcache.engine.runner import ModelRunner
from stemcache.kernels.plan import AttentionPlan, SequenceRows

pytestmark = pytest.mark.sweep
pytest.importorskip("triton", reason="the GPU kernels need Triton: pip install 'stemcache[gpu]'")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = ["llama", "gemma2", "gpt_oss"]  # the plain one; windows and softcap; windows and sinks


@pytest.fixture
def triton_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Engine, Reference]]]:
    """Engines whose attention is Triton's, each with `generate` over the same weights."""
    monkeypatch.setattr(engine_module, "ModelRunner", partial(ModelRunner, backend="triton"))
    engines: list[Engine] = []

    def make(family: str, **options: Any) -> tuple[Engine, Reference]:
        served, own = random_models(family)
        options = {"pool_bytes": 1 << 20, "chunk_tokens": CHUNK, "max_running": 5} | options
        engines.append(Engine.from_model(served.to(DEVICE), **options))
        return engines[-1], Reference(own)

    yield make
    for engine in engines:
        engine.check()
        engine.close()


def forked_prompts(rng: random.Random) -> list[list[int]]:
    """A stem, prompts that leave it inside and between chunks, and one of its own."""
    stem = [rng.randrange(3, VOCABULARY) for _ in range(3 * CHUNK + 5)]
    cuts = [3 * CHUNK, 2 * CHUNK + 7, len(stem)]
    return [*(stem[:cut] + [rng.randrange(3, VOCABULARY) for _ in range(4)] for cut in cuts), [rng.randrange(3, 99)]]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_transformers_greedy_ones(triton_engine, family):
    engine, reference = triton_engine(family)
    prompts = forked_prompts(random.Random(family))
    list(engine.generate(prompts[:1], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)))
    limits = [3, 6, 4, 2]  # so that the batch shrinks through graphs of several sizes
    streams = [
        engine.submit(prompt, SamplingParams(max_tokens=limit, temperature=0, ignore_eos=True, n=1 + (limit == 4)))
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    for prompt, limit, stream in zip(prompts, limits, streams, strict=True):
        choices: dict[int, list[int]] = {}
        for delta in stream:
            choices.setdefault(delta.index, []).extend(delta.token_ids)
        assert choices == dict.fromkeys(range(1 + (limit == 4)), reference.continuation(prompt, limit))
    graphs = engine._runner.graphs
    assert graphs.replayed >= 4
    assert 0 < graphs.planned_ahead < graphs.replayed
    assert sum(stream.usage.cached_tokens for stream in streams) > 3 * CHUNK


@pytest.mark.skipif(DEVICE == "cpu", reason="for a GPU: 88 random workloads take half an hour under the interpreter")
@pytest.mark.parametrize("family", equivalence.FAMILIES)
def test_random_workloads(family):
    served, own = random_models(family)
    reference, total = Reference(own), Tally()
    for seed in range(8):
        total.add(run_workload(served.to(DEVICE), reference, seed, by_generate=False))
    assert total.differences == []
    assert min(total.cached_tokens, total.evictions, total.preemptions) > 0


def test_a_step_that_does_not_fit_the_buffers_runs_without_them(triton_engine, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_room", lambda geometry, rows, chunks: (42, 1))  # for one of these sequences
    engine, reference = triton_engine("llama", max_running=2)
    asked = {tuple([5] * 40): 3, tuple([7] * 70): 7}
    streams = [
        engine.submit(prompt, SamplingParams(max_tokens=limit, temperature=0, ignore_eos=True))
        for prompt, limit in asked.items()
    ]
    for (prompt, limit), stream in zip(asked.items(), streams, strict=True):
        tokens = [token for delta in stream for token in delta.token_ids]
        assert tokens == reference.continuation(list(prompt), limit)
    assert 0 < engine._runner.graphs.replayed < 6, "all decode steps fitted, or none did"


def test_a_plan_is_used_only_for_the_step_that_it_foresaw():
    def rows(chunks: list[int], start: int, stop: int) -> SequenceRows:
        return SequenceRows(np.array(chunks, dtype=np.int32), start, stop)

    plan = AttentionPlan.build([rows([1, 2, 9], 20, 21), rows([4], 3, 4)], chunk_tokens=16)
    same = decode_graphs._same_step
    assert same(plan, [rows([1, 2, 8], 20, 21), rows([4], 3, 4)]), "the third chunk holds none of its tokens yet"
    assert not same(plan, [rows([1, 3, 9], 20, 21), rows([4], 3, 4)])
    assert not same(plan, [rows([1, 2, 9], 21, 22), rows([4], 3, 4)])
    assert not same(plan, [rows([4], 3, 4), rows([1, 2, 9], 20, 21)])
    assert not same(plan, [rows([1, 2, 9], 20, 21)])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 100, 256])
def test_every_batch_has_a_graph_that_is_not_much_larger(rows):
    sizes = batch_sizes(rows)
    assert sizes[-1] == rows
    for n in range(1, rows + 1):
        assert n <= min(size for size in sizes if size >= n) <= 1.5 * n


def test_the_benchmark_runs_on_what_is_there():
    benchmarks = Path(equivalence.__file__).parent
    command = [sys.executable, benchmarks / "engine_gpu.py", "--quick"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=benchmarks)
    assert "tiny: TTFT cold" in ran.stdout
    assert "tokens_per_second" in ran.stdout
