"""Compiled decoder layers: what transformers' own say, or not at all."""

from __future__ import annotations

import copy
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from equivalence import FAMILIES, bfloat16_errors, random_models
from pairs import needs_pairs
from torch import nn
from transformers import PreTrainedModel

from stemcache import Engine, SamplingParams
from stemcache.engine import compiled_layers
from stemcache.engine.compiled_layers import CompiledLayer
from stemcache.engine.outputs import Completion
from stemcache.engine.runner import ModelRunner
from stemcache.kernels import fused, products
from stemcache.kernels.layer_parts import LayerStages

OF_THE_FORM = sorted(set(FAMILIES) - {"gpt_oss"})
OF_EXPERTS = ("mixtral", "qwen3_moe")


@pytest.fixture(autouse=True, params=[True, False], ids=["compiled products", "onednn"])
def who_multiplies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside AMX products and attention are PyTorch's."""
    for module in (products, fused):
        monkeypatch.setattr(module, "is_preferred", lambda: request.param)


def models(family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedModel]:
    """With heads whose halves fill a vector."""
    return random_models(family, dtype=dtype, head_dim=32)


def served(model: PreTrainedModel, **options: Any) -> Engine:
    return Engine.from_model(model, **{"pool_bytes": 1 << 20, "chunk_tokens": 16, **options})


def compiled(model: PreTrainedModel) -> list[bool]:
    return [isinstance(layer.forward, CompiledLayer) for layer in model.model.layers]


@needs_pairs
@pytest.mark.parametrize("family", list(FAMILIES))
def test_which_families_have_the_form(family: str) -> None:
    model = models(family)[0]
    names = list(model.state_dict())
    with served(model):
        assert compiled(model) == [family in OF_THE_FORM] * len(model.model.layers)
    assert set(model.state_dict()) <= set(names)


@needs_pairs
def test_heads_whose_halves_fill_no_vector_have_their_own_layers() -> None:
    model = random_models("llama", dtype=torch.bfloat16, head_dim=16)[0]
    with served(model):
        assert not any(compiled(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_have_their_own_layers(dtype: torch.dtype) -> None:
    model = models(dtype=dtype)[0]
    with served(model):
        assert not any(compiled(model))


@needs_pairs
@pytest.mark.parametrize("family", sorted(set(OF_THE_FORM) - set(OF_EXPERTS)))
def test_logits_stay_within_transformers_own_rounding(family: str) -> None:
    """Over cached, chunked and batched steps. (Where a rounding chooses another expert, errors are what they are.)"""
    ours, theirs = bfloat16_errors(family, prompts=12, head_dim=32)
    assert ours <= 1.25 * max(theirs), (ours, theirs)


@needs_pairs
@pytest.mark.parametrize("family", OF_THE_FORM)
def test_random_batches_are_as_near_as_with_transformers_layers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of what is said in mixed steps (prompts that share, prefills beside decodes, evictions and
    preemptions) against float32 on the same weights."""
    errors = []
    exact = models(family)[1].float()
    for tolerance in (compiled_layers.TOLERANCE, -1.0):
        monkeypatch.setattr(compiled_layers, "TOLERANCE", tolerance)
        model = models(family)[0]
        rng = random.Random(1)
        heads = [[rng.randrange(3, 128) for _ in range(40)] for _ in range(3)]
        prompts = [rng.choice(heads)[: rng.randrange(1, 41)] + [rng.randrange(3, 128)] for _ in range(32)]
        with served(model, pool_bytes=1 << 18, max_step_tokens=24) as engine:
            assert all(compiled(model)) == (tolerance > 0)
            params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=0)
            said = list(engine.generate(prompts, params))
            stats = engine.stats()
            assert stats.store.evicted_chunks > 0
            assert stats.preemptions > 0
            engine.check()
        errors.append(_rms_error(exact, prompts, said))
    assert errors[0] <= 1.25 * errors[1], errors


@torch.inference_mode()
def _rms_error(exact: PreTrainedModel, prompts: list[list[int]], said: list[Completion]) -> float:
    found = []
    for prompt, completion in zip(prompts, said, strict=True):
        tokens = list(completion.token_ids)
        logits = exact(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(tokens)), tokens]
        found.append(torch.tensor([each.logprob for each in completion.logprobs]) - expected)
    return float(torch.cat(found).square().mean().sqrt())


@needs_pairs
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "third", nn.Identity()),
        lambda layer: setattr(layer.self_attn, "scale", nn.Identity()),
        lambda layer: setattr(layer, "forward", lambda *given, own=layer.forward, **named: 1.03 * own(*given, **named)),
        lambda layer: layer.input_layernorm.register_forward_hook(lambda module, given, out: 1.05 * out),
    ],
    ids=["child of layer", "child of attention", "forward", "hook"],
)
def test_a_layer_that_does_anything_else_stays_as_it_is(change: Any) -> None:
    model = models()[0]
    layer = model.model.layers[1]
    change(layer)
    before = layer.__dict__.get("forward")
    with served(model):
        assert compiled(model) == [True, False]
        assert layer.__dict__.get("forward") is before


@needs_pairs
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.mlp, "act_fn", nn.ReLU()),
        lambda layer: layer.mlp.register_module("other", nn.Identity()),
        lambda layer: setattr(layer, "mlp", nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)),
    ],
    ids=["activation", "child", "linear"],
)
def test_another_mlp_is_called_as_it_is(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params, said = SamplingParams(max_tokens=1, temperature=0, logprobs=5), []
    for tolerance in (compiled_layers.TOLERANCE, -1.0):
        monkeypatch.setattr(compiled_layers, "TOLERANCE", tolerance)
        torch.manual_seed(0)
        model = models()[0]
        change(model.model.layers[1])
        with served(model) as engine:
            assert compiled(model) == [tolerance > 0] * 2
            said.append(next(engine.generate([[5, 6, 7]], params)))
    ours, theirs = (completion.logprobs[0] for completion in said)
    assert ours.token_id == theirs.token_id
    assert ours.logprob == pytest.approx(theirs.logprob, abs=0.02)


@needs_pairs
def test_steps_of_as_many_rows_use_what_was_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    repeats = []
    repeat = LayerStages.repeat
    monkeypatch.setattr(LayerStages, "repeat", lambda *given: repeats.append(len(given[1])) or repeat(*given))
    model = models()[0]
    with served(model) as engine:
        list(engine.generate([[5, 6, 7]] * 3, SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)))
    assert repeats.count(3) >= 2 * 6, repeats  # of eight decode steps, when the last of the three has begun


@needs_pairs
def test_two_engines_over_the_same_model_at_a_time() -> None:
    """What layers write down belongs to an engine, not to the layer."""
    model = models()[0]
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
    prompts = [[[i, 6, 7 + j] for j in range(3)] for i in (5, 9)]
    with served(model) as first, served(model) as second, ThreadPoolExecutor(2) as pool:
        engines = (first, second)
        expected = [[c.token_ids for c in e.generate(p, params)] for e, p in zip(engines, prompts, strict=True)]
        for _ in range(4):
            said = pool.map(lambda e, p: [c.token_ids for c in e.generate(p, params)], engines, prompts)
            assert list(said) == expected


@needs_pairs
def test_a_second_engine_over_the_same_model() -> None:
    model = models()[0]
    params = SamplingParams(max_tokens=8, temperature=0)
    with served(model) as first, served(model) as second:
        assert all(compiled(model))
        one, other = (next(each.generate([[5, 6, 7]], params)) for each in (first, second))
        assert one.token_ids == other.token_ids
    ModelRunner(model, pool_bytes=1 << 18, chunk_tokens=16, max_running=2, backend="reference")
    assert not any(compiled(model)), "compiled layers would ask another backend"


@needs_pairs
def test_a_copy_says_the_same_and_a_pickle_is_refused() -> None:
    if not products.is_preferred():
        pytest.skip("oneDNN's weights can be neither copied nor pickled")
    model = models()[0]
    params = SamplingParams(max_tokens=8, temperature=0)
    with served(model) as engine:
        expected = next(engine.generate([[5, 6, 7]], params))
    copied = copy.deepcopy(model)
    with pytest.raises(TypeError, match="cannot be pickled: save"):
        pickle.dumps(model)
    del model
    with served(copied) as engine:
        assert next(engine.generate([[5, 6, 7]], params)).token_ids == expected.token_ids
