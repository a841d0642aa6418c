"""What lies between a layer's products, against PyTorch's own operations; and stages in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pairs import needs_pairs
from torch import Tensor
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from stemcache.kernels import fused, products
from stemcache.kernels.attention import append_kv, attend
from stemcache.kernels.layer_memory import LayerMemory
from stemcache.kernels.layer_parts import Activation, LayerStages, Norm
from stemcache.kernels.plan import AttentionPlan, SequenceRows

pytestmark = needs_pairs
ROWS = pytest.mark.parametrize("n_rows", [1, 2, 17, 300])


@pytest.fixture(autouse=True, params=[1, 2, 3, 16])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal but for a few numbers, which are off by one in the last of bfloat16's eight bits, or two of such; and where
    one is next to nothing, as PyTorch takes the tails of gelu from a difference of ones."""
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=1e-5)
    off = (actual != expected) & (expected.abs() > 0.1)
    assert int(off.sum()) <= 2 + off.numel() // 100


@ROWS
@pytest.mark.parametrize("width", [16, 96, 576, 4096])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_norm(kind: Callable[..., Any], n_rows: int, width: int, threads: int) -> None:
    theirs = kind(width, eps=1e-5).bfloat16()
    theirs.weight.data = random(width, seed=1)
    rows = 3 * random(n_rows, width)
    rows[0] *= 1e-3  # where epsilon matters
    stages = LayerStages()
    out = stages.norm(rows, Norm(theirs.weight.data, 1e-5, kind is Gemma3RMSNorm))
    stages.run()
    assert_near(out, theirs(rows))


@ROWS
def test_norm_of_heads_leaves_what_is_between_them(n_rows: int, threads: int) -> None:
    theirs = LlamaRMSNorm(32, eps=1e-6).bfloat16()
    theirs.weight.data = random(32, seed=1)
    rows = random(n_rows, 7, 32)
    expected = torch.cat([rows[:, :1], theirs(rows[:, 1:4]), rows[:, 4:]], 1)
    stages = LayerStages()
    stages.norm(rows[:, 1:4], Norm(theirs.weight.data, 1e-6), in_place=True)
    stages.run()
    assert_near(rows, expected)


@ROWS
@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(9, 3, 64), (1, 1, 32), (8, 1, 128), (2, 2, 96)])
def test_rotation(q_heads: int, kv_heads: int, head_dim: int, turns: bool, n_rows: int, threads: int) -> None:
    """Bit for bit: no sum has an order."""
    heads = random(n_rows, q_heads + 2 * kv_heads, head_dim)
    query, key, value = heads.clone().split([q_heads, kv_heads, kv_heads], 1)
    chunks = np.array([5, 2, 9, 0, 3, 11, 7, 1, 4, 6, 8, 10], dtype=np.int32)[: -(-(n_rows + 30) // 32)]
    plan = AttentionPlan.build([SequenceRows(chunks, 30, 30 + n_rows)], chunk_tokens=32)
    pool, expected = (torch.full((2, kv_heads, 12, 32, head_dim), 7.0).bfloat16() for _ in range(2))
    turn = random(n_rows, head_dim, seed=1), random(n_rows, head_dim, seed=2)
    if turns:
        query, key = apply_rotary_pos_emb(query[None], key[None], *(part[None] for part in turn), unsqueeze_dim=2)
        query, key = query[0], key[0]
    append_kv(expected, key, value, plan)
    stages = LayerStages()
    queries = stages.rotate_and_append(heads, turn if turns else None, pool, plan)
    stages.run()
    assert torch.equal(queries, query)
    assert torch.equal(pool, expected)


def test_tensors_that_do_not_fit_each_other_are_an_error() -> None:
    plan = AttentionPlan.build([SequenceRows(np.zeros(1, dtype=np.int32), 0, 3)], chunk_tokens=16)
    heads, pool, part, stages = random(3, 3, 64), torch.zeros(2, 1, 1, 16, 64).bfloat16(), random(3, 64), LayerStages()
    for wrong in (random(3, 32), random(2, 64), random(64, 3).T, part.float()):
        with pytest.raises(ValueError, match=r"heads bfloat16 \[3, 3, 64\] are not turned by"):
            stages.rotate_and_append(heads, (part, wrong), pool, plan)
    for other in (random(2, 3, 64), random(3, 3, 32), heads.float()):
        with pytest.raises(ValueError, match=r"do not fit (3 rows|a pool bfloat16 \[2, 1, 1, 16, 64\])"):
            stages.rotate_and_append(other, None, pool, plan)
    for weight in (random(32), random(64).float(), random(1, 64)):
        with pytest.raises(ValueError, match=r"are no norm's of rows bfloat16 \[3, 64\]"):
            stages.norm(part, Norm(weight, 1e-5))
    for rows, to in ((random(2, 64), part), (part.float(), part), (part, random(64, 3).T)):
        with pytest.raises(ValueError, match=r"cannot be added to bfloat16 \[3, 64\]"):
            stages.add(rows, to=to)
    stages.run()  # nothing


def test_widths_that_fill_no_vectors_are_an_error() -> None:
    plan = AttentionPlan.build([SequenceRows(np.zeros(1, dtype=np.int32), 0, 3)], chunk_tokens=16)
    stages = LayerStages()
    for ask in (
        lambda: stages.norm(random(3, 24), Norm(random(24), 1e-5)),
        lambda: stages.gate(random(3, 48), "silu"),
        lambda: stages.add(random(3, 24), random(3, 24)),
        lambda: stages.rotate_and_append(random(3, 3, 16), None, torch.zeros(2, 1, 1, 16, 16).bfloat16(), plan),
    ):
        with pytest.raises(ValueError, match="multiples of 16 numbers"):
            ask()
    stages.run()  # nothing


@ROWS
@pytest.mark.parametrize("width", [16, 1536])
@pytest.mark.parametrize(
    ("activation", "function"), [("silu", functional.silu), ("gelu_tanh", partial(functional.gelu, approximate="tanh"))]
)
def test_gate(
    activation: Activation, function: Callable[[Tensor], Tensor], n_rows: int, width: int, threads: int
) -> None:
    rows = 4 * random(n_rows, 2 * width)
    rows[0, :8] = torch.tensor([0.0, -0.0, 80.0, -80.0, 200.0, -200.0, 1e-30, -3e38])
    gates, values = rows.chunk(2, -1)
    stages = LayerStages()
    out = stages.gate(rows, activation)
    stages.run()
    assert_near(out, function(gates) * values)


@ROWS
def test_sum(n_rows: int, threads: int) -> None:
    first, second = random(n_rows, 336), random(n_rows, 336, seed=1)
    expected = first + second
    stages = LayerStages()
    assert stages.add(first, to=second) is second
    stages.run()
    assert torch.equal(second, expected)


def test_what_is_not_a_number_stays_in_its_row(threads: int) -> None:
    rows, stages = random(9, 64), LayerStages()
    rows[4, 60] = float("nan")
    normal, gated = stages.norm(rows, Norm(random(64, seed=1), 1e-5)), stages.gate(rows, "silu")
    stages.run()
    assert torch.equal(normal.isnan().any(1), torch.arange(9) == 4)
    assert torch.equal(gated.isnan(), (torch.arange(9) == 4)[:, None] & (torch.arange(32) == 28))


def test_no_stage_begins_before_the_one_before_has_ended(threads: int) -> None:
    """Two hundred sums in turn, of numbers that all threads share: one that came too early would count too little."""
    first, second = torch.full((100, 400), 2.0**-120).bfloat16(), torch.zeros(100, 400).bfloat16()
    stages = LayerStages()
    for _ in range(100):
        stages.add(first, to=second)  # the sum of both so far
        stages.add(second, to=first)
    before = first.clone()
    stages.run()
    expected, other = before, torch.zeros(100, 400).bfloat16()
    for _ in range(100):
        other += expected
        expected += other
    assert torch.equal(first, expected)
    assert torch.equal(second, other)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_products_and_attention_are_stages_or_computed_at_once(
    is_compiled: bool, threads: int, batches: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (products, fused):
        monkeypatch.setattr(module, "is_preferred", lambda: is_compiled)
    weight, rows, norm = random(96, 64), random(5, 64, seed=1), Norm(random(64, seed=2), 1e-5)
    compute = products.packed(weight, None) if is_compiled else partial(functional.linear, weight=weight)
    batch = batches([SequenceRows(np.array([3, 1], dtype=np.int32), 20, 25)], chunk_tokens=16, dtype=torch.bfloat16)
    stages = LayerStages()
    out = stages.product(compute, stages.norm(rows, norm))
    attended = stages.attend(batch.query, batch.pool, batch.plan, scale=batch.scale, window=None)
    stages.run()
    alone = LayerStages()
    normal = alone.norm(rows, norm)
    alone.run()
    torch.testing.assert_close(out, functional.linear(normal, weight), rtol=1e-2, atol=1e-2)
    expected = attend(batch.query, batch.pool, batch.plan, scale=batch.scale, backend="reference")
    torch.testing.assert_close(attended.float(), expected.float(), rtol=2e-2, atol=2e-2)


@dataclass(frozen=True)
class Asked:
    """What one step brings: the input, the angles, and who sees what."""

    rows: Tensor
    turn: tuple[Tensor, Tensor]
    plan: AttentionPlan


def asked(n_rows: int, seed: int) -> Asked:
    """Rows of one sequence or of several, with contexts of any length, on chunks of their own or shared ones."""
    rng = np.random.default_rng(seed)
    sequences = []
    for i in range(n_rows if seed % 2 else 1):
        new = 1 if seed % 2 else n_rows
        start = int(rng.integers(0, 500 - new)) if seed % 3 else 320
        own = rng.permutation(np.arange(20 + 32 * i, 52 + 32 * i))
        chunks = np.concatenate([np.arange(20), own])[: -(-(start + new) // 16)]
        sequences.append(SequenceRows(chunks.astype(np.int32), start, start + new))
    plan = AttentionPlan.build(sequences, chunk_tokens=16)
    turn = random(1, n_rows, 32, seed=seed + 1), random(1, n_rows, 32, seed=seed + 2)
    return Asked(random(n_rows, 64, seed=seed), turn, plan)


def layer(
    stages: LayerStages,
    step: Asked,
    pool: Tensor,
    computes: Sequence[Callable[[Tensor], Tensor]],
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """All parts of a layer: 4 heads of 32 on 2 KV heads."""
    qkv, out, up, down = computes
    norm, rows = Norm(random(64, seed=9), 1e-5), stages.begin(step.rows)
    heads = stages.product(qkv, stages.norm(rows, norm)).view(len(rows), 8, 32)
    stages.norm(heads[:, :4], Norm(random(32, seed=8), 1e-5), in_place=True)
    queries = stages.rotate_and_append(heads, step.turn, pool, step.plan)
    attended = stages.attend(queries, pool, step.plan, scale=0.2, window=window, sinks=sinks)
    rows = stages.add(rows, to=stages.product(out, attended.flatten(1)))
    added = stages.product(down, stages.gate(stages.product(up, stages.norm(rows, norm)), "silu"))
    return stages.end(stages.add(rows, to=added))


@pytest.mark.parametrize("kind", ["compiled", "onednn", "strided"])
@pytest.mark.parametrize(("window", "with_sinks"), [(None, False), (40, True)])
@pytest.mark.parametrize("n_rows", [1, 7])
def test_a_layer_repeated_is_a_layer_written_down_anew(
    n_rows: int, window: int | None, with_sinks: bool, kind: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over plans with one unit of work or many, with and without partial results; two layers share the memory."""
    for module in (products, fused):
        monkeypatch.setattr(module, "is_preferred", lambda: kind == "compiled")
    weights = [random(*shape, seed=i) / 8 for i, shape in enumerate([(256, 64), (64, 128), (192, 64), (64, 96)])]
    computes: list[Callable[[Tensor], Tensor]]
    if kind == "compiled":
        computes = [products.packed(weight, None) for weight in weights]
    else:
        computes = [partial(functional.linear, weight=weight) for weight in weights]
        if kind == "strided":  # a result that no view makes flat
            computes = [lambda rows, own=own: own(rows).T.contiguous().T for own in computes]
    sinks = random(4, seed=3) if with_sinks else None
    memory, pools = LayerMemory(), [random(2, 2, 300, 16, 32, seed=i) for i in range(2)]
    written: list[LayerStages] = []
    for seed in range(8):
        step = asked(n_rows, seed)
        for i, pool in enumerate(pools):
            expected_pool = pool.clone()
            expected = layer(LayerStages(), step, expected_pool, computes, window, sinks)
            if seed == 0:
                written.append(LayerStages(memory))
                actual = layer(written[i], step, pool, computes, window, sinks)
            else:
                actual = written[i].repeat(step.rows, step.turn, step.plan)
            assert torch.equal(actual, expected)
            assert torch.equal(pool, expected_pool)


def test_a_result_is_the_callers_own() -> None:
    computes = [products.packed(random(*s), None) for s in [(256, 64), (64, 128), (192, 64), (64, 96)]]
    pool, steps, memory = random(2, 2, 300, 16, 32), [asked(3, seed) for seed in (1, 2)], LayerMemory()
    given = steps[1].rows.clone()
    stages, results, copies = LayerStages(memory), [], []
    for compute in (
        lambda: layer(stages, steps[0], pool, computes, None, None),
        lambda: stages.repeat(steps[1].rows, steps[1].turn, steps[1].plan),
        lambda: layer(LayerStages(memory), steps[0], pool, computes, None, None),
        lambda: stages.repeat(steps[1].rows, steps[1].turn, steps[1].plan),
    ):
        results.append(compute())
        copies.append(results[-1].clone())
        assert all(map(torch.equal, results, copies))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    assert torch.equal(steps[1].rows, given)


def test_what_does_not_fit_is_refused_in_a_repeat_too() -> None:
    computes = [products.packed(random(*s), None) for s in [(256, 64), (64, 128), (192, 64), (64, 96)]]
    pool, step, other = random(2, 2, 300, 16, 32), asked(3, 1), asked(4, 1)
    stages = LayerStages(LayerMemory())
    expected = layer(stages, step, pool, computes, None, None)
    with pytest.raises(ValueError, match="do not fit 4 rows"):
        stages.repeat(step.rows, step.turn, other.plan)
    with pytest.raises(ValueError, match="are not turned by"):
        stages.repeat(step.rows, other.turn, step.plan)
    assert torch.equal(stages.repeat(step.rows, step.turn, step.plan), expected)


def test_memory_keeps_layers_of_one_number_of_rows_and_threads(threads: int) -> None:
    memory, stages, other = LayerMemory(), LayerStages(), LayerStages()
    assert memory.written("first", 3) is None
    memory.keep("first", stages, 3)
    memory.keep("second", other, 3)
    assert (memory.written("first", 3), memory.written("second", 3)) == (stages, other)
    assert memory.written("first", 2) is None
    torch.set_num_threads(threads + 1)
    assert memory.written("first", 3) is None
    torch.set_num_threads(threads)
    assert memory.written("first", 3) is stages, "a step of another kind that kept nothing took it away"
    memory.keep("first", other, 2)
    assert memory.written("first", 2) is other
    assert memory.written("second", 2) is None
    assert memory.written("first", 3) is None
