"""What lies between a layer's products, against PyTorch's own operations; and stages in turn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pairs import needs_pairs
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from stemcache.kernels import layer_parts
from stemcache.kernels.attention import append_kv
from stemcache.kernels.plan import AttentionPlan, SequenceRows
from stemcache.kernels.stages import Stage, run_stages

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


def assert_near(actual: Tensor, expected: Tensor, *, differing: float = 0.01) -> None:
    """Equal but for a few numbers, which are off by one in the last of bfloat16's eight bits, or two of such."""
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=1e-6)
    assert float((actual != expected).float().mean()) <= differing


@ROWS
@pytest.mark.parametrize("width", [16, 96, 576, 4096])
def test_norm(n_rows: int, width: int, threads: int) -> None:
    theirs = LlamaRMSNorm(width, eps=1e-5).bfloat16()
    theirs.weight.data = random(width, seed=1)
    rows, out = 3 * random(n_rows, width), torch.full((n_rows, width), 7.0).bfloat16()
    rows[0] *= 1e-3  # where epsilon matters
    run_stages([layer_parts.norm(rows.data_ptr(), out.data_ptr(), n_rows, theirs.weight.data, 1e-5)], threads)
    assert_near(out, theirs(rows))


@ROWS
def test_norm_of_heads_leaves_what_is_between_them(n_rows: int, threads: int) -> None:
    theirs = LlamaRMSNorm(32, eps=1e-6).bfloat16()
    theirs.weight.data = random(32, seed=1)
    rows = random(n_rows, 7, 32)
    expected = torch.cat([rows[:, :1], theirs(rows[:, 1:4]), rows[:, 4:]], 1)
    at = rows.data_ptr() + 2 * 32
    run_stages([layer_parts.norm(at, at, n_rows, theirs.weight.data, 1e-6, heads=3, stride=2 * 7 * 32)], threads)
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
    run_stages([layer_parts.rotation(heads.data_ptr(), turn if turns else None, pool, plan, q_heads)], threads)
    assert torch.equal(heads[:, :q_heads], query)
    assert torch.equal(pool, expected)


def test_cosines_of_another_shape_or_dtype_are_an_error() -> None:
    plan = AttentionPlan.build([SequenceRows(np.zeros(1, dtype=np.int32), 0, 3)], chunk_tokens=16)
    heads, pool, part = random(3, 3, 64), torch.zeros(2, 1, 1, 16, 64).bfloat16(), random(3, 64)
    for wrong in (random(3, 32), random(2, 64), random(64, 3).T, part.float()):
        with pytest.raises(ValueError, match="a head of 64 is not turned by"):
            layer_parts.rotation(heads.data_ptr(), (part, wrong), pool, plan, 1)


@ROWS
@pytest.mark.parametrize("width", [16, 1536])
def test_gate(n_rows: int, width: int, threads: int) -> None:
    rows, out = 4 * random(n_rows, 2 * width), random(n_rows, width)
    rows[0, :8] = torch.tensor([0.0, -0.0, 80.0, -80.0, 200.0, -200.0, 1e-30, -3e38])
    gates, values = rows.chunk(2, -1)
    run_stages([layer_parts.gate(rows.data_ptr(), out.data_ptr(), n_rows, width)], threads)
    assert_near(out, functional.silu(gates) * values)


@pytest.mark.parametrize("count", [16, 4096, 4112, 100_000])
def test_sum(count: int, threads: int) -> None:
    first, second = random(count), random(count, seed=1)
    expected = first + second
    run_stages([layer_parts.sum_of(first.data_ptr(), second.data_ptr(), first.data_ptr(), count)], threads)
    assert torch.equal(first, expected)


def test_what_is_not_a_number_stays_in_its_row(threads: int) -> None:
    rows, weight = random(9, 64), random(64, seed=1)
    rows[4, 60] = float("nan")
    out, gated = torch.zeros(9, 64).bfloat16(), torch.zeros(9, 32).bfloat16()
    at = rows.data_ptr(), out.data_ptr()
    run_stages(
        [layer_parts.norm(*at, 9, weight, 1e-5), layer_parts.gate(rows.data_ptr(), gated.data_ptr(), 9, 32)], threads
    )
    assert torch.equal(out.isnan().any(1), torch.arange(9) == 4)
    assert torch.equal(gated.isnan(), (torch.arange(9) == 4)[:, None] & (torch.arange(32) == 28))


def test_no_stage_begins_before_the_one_before_has_ended(threads: int) -> None:
    """Two hundred sums in turn, of numbers that all threads share: one that came too early would count too little."""
    first, second = torch.full((40_000,), 2.0**-120).bfloat16(), torch.zeros(40_000).bfloat16()
    stages: list[Stage] = []
    for _ in range(100):
        stages += [
            layer_parts.sum_of(first.data_ptr(), first.data_ptr(), second.data_ptr(), 40_000),
            layer_parts.sum_of(second.data_ptr(), second.data_ptr(), first.data_ptr(), 40_000),
        ]
    run_stages(stages, threads)
    assert torch.equal(first, torch.full((40_000,), 2.0**80).bfloat16())
