"""Packed weights: the same numbers from the same memory, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from equivalence import FAMILIES, random_models
from torch import nn

from stemcache.engine import packed
from stemcache.engine.fused import FusedLinear, fuse_projections
from stemcache.engine.packed import PackedLinear, can_pack, pack_weights

torch.set_num_threads(1)

DTYPES = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not can_pack(dtype), reason=f"this CPU or torch has no packed {dtype} products")
    )
    for dtype in (torch.bfloat16, torch.float32)
]


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 is packed whosever the processor is."""
    monkeypatch.setattr(packed, "is_amd", lambda: True)


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
def test_no_plain_weight_is_kept_but_the_vocabulary(family: str, dtype: torch.dtype) -> None:
    served = random_models(family, dtype=dtype)[0]
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
    assert type(vocabulary) is (nn.Linear if tied and dtype == torch.bfloat16 else PackedLinear)
    assert pack_weights(served) == 0, "a second engine over the same model packs nothing again"


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
