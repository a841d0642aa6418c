"""Packed weights: the same numbers from the same memory, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from equivalence import FAMILIES, random_models
from pairs import needs_pairs
from torch import nn

from stemcache.engine import packed
from stemcache.engine.fused import FusedLinear, fuse_projections
from stemcache.engine.packed import PackedLinear, can_pack, pack_weights
from stemcache.kernels import products
from stemcache.kernels.products import PairProduct

torch.set_num_threads(1)

DTYPES = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not can_pack(dtype), reason=f"this CPU or torch has no packed {dtype} products")
    )
    for dtype in (torch.bfloat16, torch.float32)
]


@pytest.fixture(
    autouse=True, params=[pytest.param(True, marks=needs_pairs, id="compiled"), pytest.param(False, id="onednn")]
)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whose products of bfloat16 they are; and float32 is packed whosever the processor is."""
    monkeypatch.setattr(products, "is_preferred", lambda: request.param)
    monkeypatch.setattr(packed, "is_amd", lambda: True)
    return bool(request.param)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: each for name, each in model.named_modules() if type(each) in (nn.Linear, FusedLinear, PackedLinear)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2"])
@torch.inference_mode()
def test_each_layer_gives_the_same_numbers(family: str, dtype: torch.dtype) -> None:
    """Up to the rounding of sums in another order; qwen2 has biases, Phi-3 layers that are fused by themselves."""
    served, own = random_models(family, dtype=dtype)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
    fuse_projections(served)
    assert pack_weights(served) > 0
    for name, plain in linears(own).items():
        theirs = served.get_submodule(name)
        for rows in (1, 3, 64, 200):
            hidden = torch.randn(1, rows, plain.in_features, dtype=dtype)
            torch.testing.assert_close(theirs(hidden), plain(hidden), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_no_plain_weight_is_kept_but_the_vocabulary(family: str, dtype: torch.dtype, compiled: bool) -> None:
    served, own = random_models(family, dtype=dtype)
    table = served.get_input_embeddings().weight
    tied = served.get_output_embeddings().weight is table
    plain = set(linears(served)) - ({"lm_head"} if tied else set())
    fuse_projections(served)
    pack_weights(served)
    for name in plain:
        each = served.get_submodule(name)
        assert isinstance(each, FusedLinear | PackedLinear)
        assert getattr(each, "weight", None) is None
        assert not isinstance(each, FusedLinear) or each.product.weight is None
    vocabulary = served.get_output_embeddings()
    assert vocabulary.weight is (table if tied else None)
    is_read = compiled and products.can_read(own.get_output_embeddings().weight)
    assert type(vocabulary) is (nn.Linear if tied and dtype == torch.bfloat16 and not is_read else PackedLinear)
    assert pack_weights(served) == 0, "a second engine over the same model packs nothing again"


@torch.inference_mode()
def test_a_vocabulary_that_is_the_table_too_is_read_where_it_lies(compiled: bool) -> None:
    """By the compiled kernel for few rows, which then takes part in every step, and by oneDNN for many."""
    tied = nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
    layer = PackedLinear(tied, shared=True)
    assert layer.weight is tied.weight
    for rows in (1, products.FEW_ROWS, products.FEW_ROWS + 1, 200):
        hidden = torch.randn(1, rows, 64, dtype=torch.bfloat16)
        torch.testing.assert_close(layer(hidden), tied(hidden), rtol=1e-2, atol=1e-2)


@torch.inference_mode()
def test_every_product_of_a_layer_is_the_compiled_kernels(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = PairProduct.__call__
    monkeypatch.setattr(PairProduct, "__call__", lambda self, hidden: calls.append(self) or run(self, hidden))
    model = random_models("llama", dtype=torch.bfloat16)[0]
    fuse_projections(model)
    n_packed = pack_weights(model)
    calls.clear()  # of what was tried first
    model(torch.zeros(1, 3, dtype=torch.long))
    assert len(calls) == (n_packed if compiled else 0)


def test_other_dtypes_and_other_processors_keep_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    half = random_models("llama", dtype=torch.float16)[0]
    assert pack_weights(half) == 0
    monkeypatch.setattr(packed, "is_amd", lambda: False)
    exact = random_models("llama")[0]
    before = copy.deepcopy(exact.state_dict())
    assert pack_weights(exact) == 0
    monkeypatch.setattr(packed, "can_pack", lambda dtype: False)
    other = random_models("llama", dtype=torch.bfloat16)[0]
    assert pack_weights(other) == 0
    assert all(type(each) is nn.Linear for each in linears(other).values())
    assert all(exact.state_dict()[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize(("vendor", "expected"), [("AuthenticAMD", True), ("GenuineIntel", False), (None, False)])
def test_the_processor_is_told_by_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str | None, expected: bool
) -> None:
    monkeypatch.undo()
    file = tmp_path / "cpuinfo"
    if vendor:
        file.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(packed, "_PROCESSORS", file)
    assert packed.is_amd() is expected
