"""Sampling parameters, and tokens chosen from logits."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stemcache import SamplingParams
from stemcache.engine.errors import EngineError, InvalidRequestError
from stemcache.engine.sampler import TokenChooser, choose_tokens

CPU = torch.device("cpu")

BAD = {
    "max_tokens": [-1, 1.5, True],
    "temperature": [-0.1, math.nan, math.inf, 101.0, "hot"],
    "top_p": [0.0, 1.1, math.nan, -1],
    "top_k": [-1, 1.5],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0.0, -1.0, math.nan],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, math.inf],
    "logit_bias": [{1: 101.0}, {1: math.nan}, {-1: 0.0}, {"a": 1.0}],
    "seed": [2**63, 1.5],
    "n": [0, 129, 1.0],
    "logprobs": [-1, 21],
    "stop": ["word", [""], [1], ["x"] * 17],
    "stop_token_ids": [[-1], [1.5]],
    "min_tokens": [-1, 17, 1.5],
    "allowed_token_ids": [[], [-1], [1.5]],
    "bad_words": ["word", [""], [1], ["x"] * 257],
    "prompt_logprobs": [-1, 21],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_parameters_are_named(name, value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def chosen(logits, params, *, history=(0,), index=0, noted=()):
    chooser = TokenChooser(params, index, CPU)
    for token in noted:
        chooser.note(token)
    return choose_tokens(logits[None], [chooser], [list(history)])[0]


def test_greedy_takes_the_likeliest():
    logits = torch.tensor([0.1, 3.0, -1.0])
    assert chosen(logits, SamplingParams(temperature=0)).token_id == 1


def test_bias_bans_and_forces():
    logits = torch.tensor([0.1, 3.0, -1.0])
    assert chosen(logits, SamplingParams(temperature=0, logit_bias={1: -100.0})).token_id == 0
    assert chosen(logits, SamplingParams(temperature=0, logit_bias={2: 100.0})).token_id == 2


def test_presence_and_frequency_penalties_count_the_output():
    logits = torch.tensor([1.0, 1.9, 0.0])
    assert chosen(logits, SamplingParams(temperature=0, presence_penalty=1.0), noted=[1]).token_id == 0
    assert chosen(logits, SamplingParams(temperature=0, frequency_penalty=0.4), noted=[1, 1]).token_id == 1
    assert chosen(logits, SamplingParams(temperature=0, frequency_penalty=0.4), noted=[1, 1, 1]).token_id == 0
    # The prompt does not count, unlike with the repetition penalty.
    assert chosen(logits, SamplingParams(temperature=0, presence_penalty=2.0), history=[1]).token_id == 1


def test_repetition_penalty_counts_prompt_and_output_and_works_on_both_signs():
    logits = torch.tensor([1.0, 1.5, -1.0])
    assert chosen(logits, SamplingParams(temperature=0, repetition_penalty=2.0), history=[1]).token_id == 0
    logits = torch.tensor([-1.5, -1.0, -3.0])
    assert chosen(logits, SamplingParams(temperature=0, repetition_penalty=2.0), history=[1]).token_id == 0


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 3}, [TopKLogitsWarper(3)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.6, "top_k": 5, "top_p": 0.9},
            [TemperatureLogitsWarper(1.6), TopKLogitsWarper(5), TopPLogitsWarper(0.9)],
        ),
    ],
)
def test_draws_follow_the_distribution_of_transformers(params, warpers):
    """A chi-square test against transformers' warpers, at a level that a wrong filter or temperature cannot pass."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.2, 0.0, -1.0, -2.0])
    expected = torch.softmax(LogitsProcessorList(warpers)(None, logits[None].clone())[0], -1)
    chooser, draws = TokenChooser(SamplingParams(seed=7, **params), 0, CPU), 3000
    counts = Counter(chooser.choose(logits, [0]) for _ in range(draws))
    assert all(expected[token] > 0 for token in counts), "a filtered token was drawn"
    possible = expected > 0
    seen = torch.tensor([float(counts[i]) for i in range(len(logits))])
    chi2 = ((seen - draws * expected)[possible].square() / (draws * expected[possible])).sum()
    assert chi2 < 30  # the 0.9999 quantile for 6 degrees of freedom is 27.9


def test_a_seed_repeats_itself_and_choices_differ():
    logits = torch.zeros(1000)
    params = SamplingParams(seed=11)

    def draws(index):
        chooser = TokenChooser(params, index, CPU)
        return [chooser.choose(logits, [0]) for _ in range(8)]

    assert draws(0) == draws(0)
    assert draws(0) != draws(1)


def test_without_a_seed_draws_differ():
    logits = torch.zeros(100_000)
    assert len({chosen(logits, SamplingParams()).token_id for _ in range(4)}) > 1


def test_logprobs_are_those_of_the_raw_logits():
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0])
    result = chosen(logits, SamplingParams(temperature=0, logprobs=2, logit_bias={3: 50.0}))
    expected = torch.log_softmax(logits, -1)
    assert result.token_id == 3
    assert result.logprob.logprob == pytest.approx(float(expected[3]))
    assert [token for token, _ in result.logprob.top] == [1, 3]
    assert result.logprob.top[0][1] == pytest.approx(float(expected[1]))
    assert chosen(logits, SamplingParams(temperature=0, logprobs=0)).logprob.top == ()


def test_nan_logits_are_an_error_and_not_a_token():
    logits = torch.tensor([[0.0, math.nan, 1.0]])
    with pytest.raises(EngineError, match="NaN"):
        choose_tokens(logits, [TokenChooser(SamplingParams(), 0, CPU)], [[0]])
