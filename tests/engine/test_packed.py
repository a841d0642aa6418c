"""Packed weights: the same numbers from the same memory, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from equivalence import FAMILIES, random_models
from torch import nn

from stemcache.engine import packed
from stemcache.engine.fused import FusedLinear, fuse_projections
from stemcache.engine.packed import PackedLinear, can_pack, pack_weights

torch.set_num_threads(1)

needs_packing = pytest.mark.skipif(not can_pack(), reason="this CPU or this torch has no packed bfloat16 products")


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: each for name, each in model.named_modules() if type(each) in (nn.Linear, FusedLinear, PackedLinear)}


@needs_packing
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2"])
@torch.inference_mode()
def test_each_layer_gives_the_same_numbers(family: str) -> None:
    """Up to the rounding of sums in another order; qwen2 has biases, Phi-3 layers that are fused by themselves."""
    served, own = random_models(family, dtype=torch.bfloat16)
    fuse_projections(served)
    assert pack_weights(served) > 0
    for name, plain in linears(own).items():
        theirs = served.get_submodule(name)
        for rows in (1, 3, 64, 200):
            hidden = torch.randn(1, rows, plain.in_features, dtype=torch.bfloat16)
            torch.testing.assert_close(theirs(hidden), plain(hidden), rtol=1e-2, atol=1e-2)


@needs_packing
@pytest.mark.parametrize("family", list(FAMILIES))
def test_no_plain_weight_is_kept_but_the_vocabulary(family: str) -> None:
    served = random_models(family, dtype=torch.bfloat16)[0]
    vocabulary = served.get_output_embeddings()
    plain = {name for name, each in linears(served).items() if each is not vocabulary}
    fuse_projections(served)
    pack_weights(served)
    for name in plain:
        each = served.get_submodule(name)
        assert isinstance(each, FusedLinear | PackedLinear)
        assert getattr(each, "weight", None) is None
        assert not isinstance(each, FusedLinear) or each.product.weight is None
    assert served.get_output_embeddings() is vocabulary
    assert vocabulary.weight.dtype == torch.bfloat16
    assert pack_weights(served) == 0, "a second engine over the same model packs nothing again"


def test_other_dtypes_and_other_processors_keep_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = random_models("llama")[0]
    before = copy.deepcopy(exact.state_dict())
    assert pack_weights(exact) == 0
    monkeypatch.setattr(packed, "can_pack", lambda: False)
    other = random_models("llama", dtype=torch.bfloat16)[0]
    assert pack_weights(other) == 0
    assert all(type(each) is nn.Linear for each in linears(other).values())
    assert all(exact.state_dict()[name].equal(value) for name, value in before.items())
