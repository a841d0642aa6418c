"""Log-probabilities of prompts against transformers' log-softmax: cached and not, in pieces, evicted and preempted."""

from __future__ import annotations

import random

import pytest
import torch
from equivalence import CHUNK, VOCABULARY, random_prompts

from stemcache import Engine, SamplingParams
from stemcache.engine.errors import InvalidRequestError

SCORE = SamplingParams(max_tokens=0, prompt_logprobs=3)
FAMILIES = ["llama", "gemma2", "gpt_oss"]  # plain; a window and softcapped logits; sinks and experts


def scored(engine, prompt, params=SCORE):
    stream = engine.submit(prompt, params)
    return stream, list(stream)


@torch.inference_mode()
def assert_scores(stream, prompt, reference):
    expected = torch.log_softmax(reference(torch.tensor([prompt])).logits[0].float(), -1)
    assert stream.prompt_logprobs[0] is None
    assert len(stream.prompt_logprobs) == len(prompt)
    for row, (token, found) in enumerate(zip(prompt[1:], stream.prompt_logprobs[1:], strict=True)):
        assert found.token_id == token
        assert found.logprob == pytest.approx(float(expected[row, token]), abs=1e-4)
        values, ids = expected[row].topk(3)
        assert [logprob for _, logprob in found.top] == pytest.approx(values.tolist(), abs=1e-4)
        if float((values[:-1] - values[1:]).min()) > 1e-3:  # no tie that rounding could turn
            assert [other for other, _ in found.top] == ids.tolist()
        above = int((expected[row] > expected[row, token] + 1e-4).sum())
        assert above + 1 <= found.rank <= above + 1 + int((expected[row] - expected[row, token]).abs().lt(1e-4).sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_random_workloads(models, family, seed):
    """Some prompts are scored, others generate beside them; the pool is small, so chunks are evicted and shared."""
    served, reference = models(family)
    rng = random.Random(seed)
    prompts = random_prompts(rng, 6)
    longest = max(-(-(len(p) + 8) // CHUNK) for p in prompts)
    chunk_bytes = CHUNK * 2 * served.config.num_hidden_layers * served.config.num_key_value_heads * 16 * 4
    options = dict(chunk_tokens=CHUNK, max_step_tokens=rng.choice([7, 40, 512]))
    with Engine.from_model(served, pool_bytes=chunk_bytes * (longest + rng.choice([0, 2, 9])), **options) as engine:
        engine._loop.scheduler._max_logit_rows = rng.choice([0, 5, 1000])
        for _ in range(2):  # the second time everything that was not evicted is cached
            jobs = []
            for prompt in prompts:
                n = rng.choice([1, 1, 2])
                params = SamplingParams(max_tokens=rng.choice([0, 5]), prompt_logprobs=3, temperature=0, n=n)
                jobs.append((prompt, engine.submit(prompt, params)))
                engine.submit(prompt, SamplingParams(max_tokens=3, temperature=0))
            for prompt, stream in jobs:
                list(stream)
                assert_scores(stream, prompt, reference._model)
        engine.check()


def test_the_answer_is_the_same_with_and_without(models, llama_engine):
    engine, prompt = llama_engine(), [5 + i % 60 for i in range(50)]
    stream, deltas = scored(engine, prompt, SamplingParams(max_tokens=6, prompt_logprobs=0, temperature=0))
    assert [t for delta in deltas for t in delta.token_ids] == models("llama")[1].continuation(prompt, 6)
    assert {logprob.top for logprob in stream.prompt_logprobs[1:]} == {()}


def test_nothing_cached_is_used_and_nothing_is_stored_twice(llama_engine):
    engine, prompt = llama_engine(), [5 + i % 60 for i in range(50)]
    for written in (48, 0):
        stream, deltas = scored(engine, prompt)
        assert (stream.usage.cached_tokens, stream.usage.cache_write_tokens) == (0, written)
        assert [(delta.token_ids, delta.finish_reason) for delta in deltas] == [((), "length")]
    stats = engine.stats().store
    assert (stats.cached_chunks, stats.deduplicated_chunks) == (3, 3)


def test_rows_of_logits_are_bounded(llama_engine):
    engine = llama_engine()
    engine._loop.scheduler._max_logit_rows = 9
    run, rows = engine._runner.run, []

    def counting(step):
        logits = run(step)
        rows.append(len(logits) - len(step))
        return logits

    engine._runner.run = counting
    streams = [engine.submit([5 + i] * 40, SCORE) for i in range(4)]
    for stream in streams:
        assert len(list(stream)) == 1
        assert len(stream.prompt_logprobs) == 40
    assert max(rows) <= 9
    assert sum(rows) > 100  # 160 rows, of which each step has one a sequence free


def test_a_prompt_as_long_as_the_context_can_be_scored(llama_engine):
    engine = llama_engine()
    prompt = [7] * engine.max_model_len
    stream, _ = scored(engine, prompt)
    assert len(stream.prompt_logprobs) == len(prompt)
    with pytest.raises(InvalidRequestError):
        engine.submit([*prompt, 7], SCORE)


def test_several_choices_all_end(llama_engine):
    _, deltas = scored(llama_engine(), [5, 6, 7], SamplingParams(max_tokens=0, n=3))
    assert [delta.index for delta in deltas] == [0, 1, 2]


def test_one_token_has_nothing_to_score(llama_engine):
    stream, deltas = scored(llama_engine(), [VOCABULARY - 1], SamplingParams(max_tokens=2, prompt_logprobs=1))
    assert stream.prompt_logprobs == [None]
    assert sum(len(delta.token_ids) for delta in deltas) == 2 or deltas[-1].finish_reason == "stop"
