"""Fused projections: the same numbers, the same parameters, nothing held twice."""

from __future__ import annotations

import copy

import pytest
import torch
from equivalence import random_models
from torch import nn

from stemcache.engine.fused import FusedLinear, fuse_projections

torch.set_num_threads(1)


class Projections(nn.Module):
    """What attention layers look like from here."""

    def __init__(self, bias: bool, dtype: torch.dtype, n_keys: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 24, bias=bias, dtype=dtype)
        self.k_proj = nn.Linear(12, n_keys, bias=bias, dtype=dtype)
        self.v_proj = nn.Linear(12, 8, bias=bias, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_the_same_numbers(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    plain = Projections(bias, dtype)
    fused = copy.deepcopy(plain)
    assert fuse_projections(fused) == 2
    for rows in (1, 3, 64):
        hidden = torch.randn(1, rows, 12).to(dtype)
        for own, theirs in zip(fused(hidden), plain(hidden), strict=True):
            torch.testing.assert_close(own, theirs)
    assert fused.q_proj.product._input is None, "a step's activations are not kept"


@torch.inference_mode()
def test_any_order_any_input() -> None:
    """Projections that are asked for out of turn, twice, or with other inputs are right all the same."""
    torch.manual_seed(2)
    plain = Projections(True, torch.float32)
    fused = copy.deepcopy(plain)
    fuse_projections(fused)
    first, second = torch.randn(2, 5, 12)
    for name, hidden in [("v", first), ("v", first), ("q", second), ("k", first), ("k", second), ("q", second)]:
        own, theirs = (getattr(model, f"{name}_proj")(hidden) for model in (fused, plain))
        torch.testing.assert_close(own, theirs)


def test_parameters_keep_names_and_values_and_share_one_memory() -> None:
    plain = Projections(True, torch.float32)
    fused = copy.deepcopy(plain)
    fuse_projections(fused)
    own, theirs = fused.state_dict(), plain.state_dict()
    assert own.keys() == theirs.keys()
    assert all(own[name].equal(theirs[name]) for name in own)
    weights = [fused.q_proj.weight, fused.k_proj.weight, fused.v_proj.weight]
    assert len({each.untyped_storage().data_ptr() for each in weights}) == 1
    assert weights[0].untyped_storage().nbytes() == sum(each.nbytes for each in weights)
    other = Projections(True, torch.float32)
    fused.load_state_dict(other.state_dict())
    hidden = torch.randn(1, 2, 12)
    for mine, given in zip(fused(hidden), other(hidden), strict=True):
        torch.testing.assert_close(mine, given)


def test_what_does_not_fit_together_stays_as_it_is() -> None:
    model = Projections(False, torch.float32)
    model.k_proj = nn.Linear(12, 8, bias=True)
    assert fuse_projections(model) == 0
    assert type(model.q_proj) is nn.Linear
    model.k_proj = nn.Bilinear(12, 12, 8)
    assert fuse_projections(model) == 0


@pytest.mark.parametrize(("family", "saved"), [("llama", 3), ("qwen2", 3), ("phi3", 0), ("mixtral", 2)])
def test_families(family: str, saved: int) -> None:
    """Products that are saved a layer; Phi-3 has fused ones of its own, Mixtral's experts are none of ours."""
    model = random_models(family)[1]
    layers = model.config.num_hidden_layers
    assert fuse_projections(model) == saved * layers
    assert sum(isinstance(each, FusedLinear) for each in model.modules()) == {3: 5, 2: 3, 0: 0}[saved] * layers
