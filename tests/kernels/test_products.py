"""Products of bfloat16 rows by the compiled kernel against float64."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pairs import needs_pairs
from torch import Tensor

from stemcache.kernels import products
from stemcache.kernels.products import PairProduct, can_pack, can_read, packed, plain

TOLERANCE = 4.5e-3
"""Relative to the largest result: half an ulp of bfloat16 (3.9e-3 where it is largest), and what float32 sums lose."""

pytestmark = needs_pairs
MAKERS = pytest.mark.parametrize("make", [packed, plain])
SHAPES = [(32, 32), (64, 64), (96, 96), (576, 1536), (960, 576), (160, 320)]


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(products, "is_preferred", lambda: True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_close(actual: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    expected = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert actual.shape == expected.shape
    assert actual.dtype == torch.bfloat16
    error = float((actual.double() - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE, f"relative error {error:.1e}"


@MAKERS
@pytest.mark.parametrize("n_threads", [1, 2, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_rows(make: Callable[..., PairProduct], shape: tuple[int, int], n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    weight, bias = random(*shape), random(shape[0], seed=1)
    with_bias, without = make(weight, bias), make(weight, None)
    for rows in (1, 2, 3, 4, 5, 7, 16, 31, 129, 300):
        hidden = random(1, rows, shape[1], seed=rows)
        assert_close(with_bias(hidden), hidden, weight, bias)
        assert_close(without(hidden), hidden, weight)


@pytest.mark.parametrize("inputs", [2, 6, 34, 100])
def test_packed_takes_any_number_of_pairs(inputs: int) -> None:
    weight, hidden = random(96, inputs), random(9, inputs, seed=1)
    assert can_pack(weight)
    assert not can_read(weight)
    assert_close(packed(weight, None)(hidden), hidden, weight)


@MAKERS
def test_a_row_is_the_same_alone_and_among_others(make: Callable[..., PairProduct]) -> None:
    product, hidden = make(random(160, 320), random(160, seed=1)), random(300, 320, seed=2)
    together = product(hidden)
    for row in (0, 3, 129, 298, 299):
        assert torch.equal(product(hidden[row : row + 1])[0], together[row])
        assert torch.equal(product(hidden[row - row % 3 :])[row % 3], together[row])


@MAKERS
def test_shapes_of_the_input(make: Callable[..., PairProduct]) -> None:
    weight = random(64, 96)
    product = make(weight, None)
    for hidden in (random(96), random(2, 3, 4, 96), random(0, 96), random(96, 5).T, random(7, 192)[:, 96:]):
        out = product(hidden)
        assert out.shape == (*hidden.shape[:-1], 64)
        if hidden.numel():
            assert_close(out, hidden, weight)


def test_packed_copies_the_weight_and_plain_reads_it_where_it_lies() -> None:
    weight, hidden = random(64, 96), random(3, 96, seed=1)
    before = weight.clone()
    copy, same = packed(weight, None), plain(weight, None)
    weight.mul_(2)
    assert_close(copy(hidden), hidden, before)
    assert_close(same(hidden), hidden, weight)


@MAKERS
def test_what_is_not_finite_stays_in_its_row_and_column(make: Callable[..., PairProduct]) -> None:
    weight, hidden = random(64, 96), random(9, 96, seed=1)
    weight[40, 5], hidden[7, 2], hidden[1, 0] = float("nan"), float("inf"), float("nan")
    out = make(weight, None)(hidden)
    broken = torch.zeros(9, 64, dtype=torch.bool)
    broken[:, 40], broken[7], broken[1] = True, True, True
    assert torch.equal(out.isfinite(), ~broken)


@MAKERS
def test_several_threads_may_use_one_product(make: Callable[..., PairProduct]) -> None:
    product = make(random(960, 576), None)
    inputs = [random(1 + seed % 7, 576, seed=seed) for seed in range(40)]
    expected = [product(hidden) for hidden in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(product, inputs), expected))


def test_a_copy_outlives_the_original_and_a_pickle_is_refused() -> None:
    weight, hidden = random(64, 96), random(3, 96, seed=1)
    product = packed(weight, None)
    with pytest.raises(TypeError, match="cannot be pickled: save the model before"):
        pickle.dumps(product)
    copied = copy.deepcopy(product)
    del product
    gc.collect()
    assert_close(copied(hidden), hidden, weight)


@MAKERS
def test_another_shape_or_dtype_is_an_error(make: Callable[..., PairProduct]) -> None:
    product = make(random(64, 96), None)
    with pytest.raises(TypeError, match=r"96 bfloat16 inputs was given float32 \[3, 96\]"):
        product(random(3, 96).float())
    with pytest.raises(TypeError, match=r"was given bfloat16 \[3, 64\]"):
        product(random(3, 64))


def test_what_it_is_not_there_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_pack(random(64, 96))
    assert can_read(random(64, 96))
    for weight in (random(48, 96), random(64, 96).float()):
        assert not can_pack(weight)
        assert not can_read(weight)
    assert not can_pack(random(64, 97))
    assert not can_read(random(64, 80))
    assert not can_read(random(64, 96).T)
    assert can_pack(random(96, 64).T)
    monkeypatch.setattr(products, "is_preferred", lambda: False)
    assert not can_pack(random(64, 96))
    assert not can_read(random(64, 96))
