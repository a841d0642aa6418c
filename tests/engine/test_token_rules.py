"""Which tokens may come: min_tokens, allowed_token_ids, bad_words; and what may end a text."""

from __future__ import annotations

import pytest

from stemcache import SamplingParams
from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.token_rules import TokenRules

PROMPT = [7 + i % 50 for i in range(40)]


def generated(engine, prompt=PROMPT, **params):
    (completion,) = engine.generate([prompt], SamplingParams(**{"temperature": 0, "max_tokens": 12, **params}))
    return completion


def test_min_tokens_holds_back_what_would_end(llama_engine):
    engine = llama_engine()
    tokens = generated(engine, ignore_eos=True).token_ids
    ends = {"stop_token_ids": [tokens[2]], "ignore_eos": True}
    assert len(generated(engine, **ends).token_ids) <= 3
    for least in (1, 5, 12):
        completion = generated(engine, min_tokens=least, **ends)
        assert len(completion.token_ids) >= least
        assert tokens[2] not in completion.token_ids[:least]
    assert completion.finish_reason == "length"


def test_end_of_sequence_counts_as_an_end(llama_engine):
    engine = llama_engine()
    bias = {"logit_bias": {2: 100.0}, "max_tokens": 9}
    assert generated(engine, **bias).token_ids == (2,)
    assert generated(engine, min_tokens=4, **bias).token_ids[4:] == (2,)


def test_only_allowed_tokens_come(llama_engine):
    engine = llama_engine()
    for temperature in (0, 2.0):
        tokens = generated(engine, allowed_token_ids=[9, 11, 13], temperature=temperature, seed=1, max_tokens=40)
        assert set(tokens.token_ids) <= {9, 11, 13}


def test_rules_that_leave_nothing_are_refused(llama_engine):
    engine = llama_engine()
    with pytest.raises(InvalidRequestError) as caught:
        engine.submit(PROMPT, SamplingParams(allowed_token_ids=[2], min_tokens=1))
    assert caught.value.param == "allowed_token_ids"
    assert generated(engine, allowed_token_ids=[2]).token_ids == (2,)


def test_bad_words_do_not_come(demo_engine):
    plain = generated(demo_engine, demo_engine.encode("The code"), ignore_eos=True, max_tokens=30)
    word = demo_engine.prompts.token_text(plain.token_ids[4]).strip()
    assert word
    other = generated(demo_engine, demo_engine.encode("The code"), ignore_eos=True, max_tokens=30, bad_words=[word])
    banned = {tuple(demo_engine.encode(text)) for text in (word, " " + word)}
    for phrase in banned:
        starts = range(len(other.token_ids) - len(phrase) + 1)
        assert all(other.token_ids[i : i + len(phrase)] != phrase for i in starts)


def test_a_phrase_forbids_its_last_token_after_the_others_only():
    import torch

    rules = TokenRules(None, (), 0, ((4, 5), (6,)))
    scores = torch.zeros(8)
    assert rules.apply(scores, [1, 4]).isneginf().nonzero().flatten().tolist() == [5, 6]
    assert rules.apply(scores, [4, 1]).isneginf().nonzero().flatten().tolist() == [6]
    assert not scores.isneginf().any()


def test_stop_strings_before_min_tokens_are_plain_text(demo_engine):
    ids = demo_engine.encode("The code")
    whole = generated(demo_engine, ids, ignore_eos=True, max_tokens=30)
    stop = whole.text[:3]
    assert generated(demo_engine, ids, ignore_eos=True, max_tokens=30, stop=[stop]).text == ""
    later = generated(demo_engine, ids, ignore_eos=True, max_tokens=30, stop=[stop], min_tokens=10)
    assert whole.text.startswith(later.text)
    assert later.text.startswith(stop)
    assert len(later.token_ids) >= 10


def test_the_stop_string_can_be_kept(demo_engine):
    ids = demo_engine.encode("The code")
    whole = generated(demo_engine, ids, ignore_eos=True, max_tokens=30).text
    stop = whole[5:8]
    cut = generated(demo_engine, ids, ignore_eos=True, max_tokens=30, stop=[stop]).text
    kept = generated(demo_engine, ids, ignore_eos=True, max_tokens=30, stop=[stop], include_stop_str_in_output=True)
    assert kept.text == cut + stop
    assert kept.finish_reason == "stop"


def test_special_tokens_can_be_shown(demo_engine):
    end = demo_engine.encode("<|end|>")
    bias = {"logit_bias": {end[0]: 100.0}, "max_tokens": 3}
    assert generated(demo_engine, ignore_eos=True, **bias).text == ""
    shown = generated(demo_engine, ignore_eos=True, skip_special_tokens=False, **bias)
    assert shown.text == "<|end|>" * 3
    stopped = generated(demo_engine, skip_special_tokens=False, include_stop_str_in_output=True, **bias)
    assert (stopped.text, stopped.finish_reason) == ("<|end|>", "stop")
    assert generated(demo_engine, skip_special_tokens=False, **bias).text == ""
