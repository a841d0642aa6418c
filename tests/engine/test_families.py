"""Every family gives the tokens that transformers' own model gives; everything else is refused by name."""

from __future__ import annotations

import random

import pytest
import torch
from equivalence import FAMILIES, Tally, bfloat16_errors, run_workload
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config

from stemcache import Engine
from stemcache.engine import families
from stemcache.engine.errors import ModelLoadError

# `make equivalence` runs 200, all by `generate`, which takes longer than what it is compared with.
WORKLOADS, BY_GENERATE = 8, 2


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_transformers_greedy_ones(family, models):
    served, reference = models(family)
    total = Tally()
    for seed in range(WORKLOADS):
        total.add(run_workload(served, reference, seed, by_generate=seed < BY_GENERATE))
    assert total.differences == []
    # A comparison that never shared, evicted or preempted would prove nothing.
    assert total.choices > 20
    assert total.cached_tokens > 0
    assert total.evictions > 0
    assert total.preemptions > 0


def test_the_judge_of_one_pass_says_what_generate_says(models):
    reference, rng = models("llama")[1], random.Random(1)
    for _ in range(4):
        prompt = [rng.randrange(3, 128) for _ in range(rng.randrange(1, 40))]
        tokens = reference.continuation(prompt, 8)
        assert reference.judge(prompt, tokens) == tokens
        for index in range(8):
            wrong = tokens[:index] + [(tokens[index] + 1) % 128] + tokens[index + 1 :]
            assert reference.judge(prompt, wrong)[: index + 1] == tokens[: index + 1]


def test_every_served_family_is_compared():
    assert sorted(families.FAMILIES) == sorted(FAMILIES)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss"])
def test_bfloat16_stays_within_transformers_own_rounding(family):
    """Against float32 on the same weights: our error is that of transformers' bfloat16 in its other batch shapes."""
    ours, theirs = bfloat16_errors(family, prompts=8)
    assert ours <= 1.25 * max(theirs), (ours, theirs)


def test_other_families_are_refused_by_name():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32)
    with pytest.raises(ModelLoadError, match=r"'gpt2'.*llama"):
        Engine.from_model(AutoModelForCausalLM.from_config(config))


def test_bidirectional_models_are_refused():
    config = LlamaConfig()
    config.use_bidirectional_attention = True
    with pytest.raises(ModelLoadError, match="bidirectional"):
        families.require_served(config)


def test_rotation_that_depends_on_the_length_limits_the_context():
    short, long = [1.0] * 8, [4.0] * 8
    config = Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": 128,
            "partial_rotary_factor": 1.0,
        },
    )
    assert families.context_length(config) == 128
    assert families.context_length(LlamaConfig(max_position_embeddings=512)) == 512


def test_an_attention_argument_that_is_not_known_is_refused_when_loading():
    """A family that grows a new argument must not be served as if it had none."""
    served = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    attention = served.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs, position_bias=torch.zeros(1))
    with pytest.raises(ModelLoadError, match="position_bias"):
        Engine.from_model(served)
