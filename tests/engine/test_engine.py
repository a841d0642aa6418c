"""The engine as its users see it: sharing, forks, cancellation, bad input, failures. After each test nothing leaks."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
import torch
from equivalence import random_models
from waiting import until

from stemcache import Engine, SamplingParams
from stemcache.engine.errors import ContextLengthError, EngineClosedError, EngineError, InvalidRequestError

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PREFIX = [7 + i % 50 for i in range(80)]  # five chunks of 16


def tokens_of(engine, prompt, params=GREEDY):
    (completion,) = engine.generate([prompt], params)
    return list(completion.token_ids)


def count_rows(engine):
    """Make the engine count the tokens that it computes."""
    run, rows = engine._runner.run, []

    def counting(step):
        rows.append(sum(entry.stop - entry.start for entry in step))
        return run(step)

    engine._runner.run = counting
    return rows


# -- sharing ---------------------------------------------------------------------------------------------------------


def test_a_second_request_computes_only_what_is_new(llama_engine):
    engine = llama_engine()
    first, second = engine.generate([PREFIX + [3]], GREEDY), engine.generate([PREFIX + [4]], GREEDY)
    assert next(first).usage.cached_tokens == 0
    (again,) = engine.generate([PREFIX + [4]], GREEDY)
    assert next(second).usage.cached_tokens == 80
    assert again.usage.cached_tokens == 80
    assert again.usage.prompt_tokens == 81
    assert again.usage.completion_tokens == 6


def test_tokens_inside_a_diverging_chunk_are_reused(llama_engine):
    engine = llama_engine()
    tokens_of(engine, PREFIX + [3])
    (completion,) = engine.generate([PREFIX[:70] + [3, 3, 3]], GREEDY)
    assert completion.usage.cached_tokens == 70  # four chunks, and six tokens copied out of the fifth


def test_a_whole_prompt_that_is_cached_computes_one_token(llama_engine):
    engine = llama_engine()
    expected = tokens_of(engine, PREFIX)
    rows = count_rows(engine)
    (completion,) = engine.generate([PREFIX], SamplingParams(max_tokens=1, temperature=0))
    assert completion.usage.cached_tokens == 79
    assert rows == [1]
    assert list(completion.token_ids) == expected[:1]


def test_a_burst_computes_its_shared_prefix_once(llama_engine):
    """Requests that arrive while the prefix is being computed wait for it, also when it takes several steps."""
    engine = llama_engine(max_step_tokens=20)
    rows = count_rows(engine)
    prompts = [PREFIX + [i] for i in range(8)]
    completions = list(engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0)))
    assert sum(rows) == len(PREFIX) + len(prompts)
    assert sorted(c.usage.cached_tokens for c in completions) == [0] + [80] * 7


@pytest.mark.parametrize(("decoding", "arriving", "prompt_tokens"), [(1, 3, 48), (1, 1, 32), (3, 1, 16), (8, 1, 16)])
def test_prompts_get_the_part_of_a_step_that_goes_with_how_many_wait(llama_engine, decoding, arriving, prompt_tokens):
    """Of 64 tokens, and a quarter of them at least, however many would have to wait for the next word."""
    engine = llama_engine(max_step_tokens=64)
    run, steps, all_decode, all_there = engine._runner.run, [], threading.Event(), threading.Event()

    def gated(step):
        if [entry.n_rows for entry in step] == [1] * decoding:
            all_decode.set()
            all_there.wait(timeout=30)
        steps.append([entry.n_rows for entry in step])
        return run(step)

    engine._runner.run = gated
    long = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    streams = [engine.submit([3 + i, 5], long) for i in range(decoding)]
    assert all_decode.wait(timeout=30)
    streams += [engine.submit([20 + i] * 70, GREEDY) for i in range(arriving)]
    all_there.set()
    for stream in streams:
        list(stream)
    first = next(step for step in steps if step[:decoding] == [1] * decoding and len(step) > decoding)
    assert sum(first[decoding:]) == prompt_tokens


def test_who_waits_for_a_prefix_goes_on_when_its_computation_is_cancelled(llama_engine):
    engine = llama_engine(max_step_tokens=8)
    first = engine.submit(PREFIX + [3], GREEDY)
    second = engine.submit(PREFIX + [4], GREEDY)
    first.cancel()
    assert [t for delta in second for t in delta.token_ids] == tokens_of(engine, PREFIX + [4])


def test_tenants_share_nothing(llama_engine):
    engine = llama_engine()
    for tenant in (b"a", b"b"):
        stream = engine.submit(PREFIX + [3], GREEDY, tenant=tenant)
        list(stream)
        assert stream.usage.cached_tokens == 0
    again = engine.submit(PREFIX + [3], GREEDY, tenant=b"b")
    list(again)
    assert again.usage.cached_tokens == 80


def test_choices_fork_from_one_prefill(llama_engine):
    engine = llama_engine()
    rows = count_rows(engine)
    prompt = PREFIX[:37]
    completions = list(engine.generate([prompt], SamplingParams(max_tokens=1, seed=3, n=5)))
    assert [c.index for c in completions] == [0, 1, 2, 3, 4]
    assert sum(rows) == 37
    assert completions[0].usage.completion_tokens == 5


def test_choices_beside_a_prompt_that_is_only_read(llama_engine):
    """One prompt gives one row of logits for two choices, the other one row for none: as many rows as choices."""
    engine = llama_engine()
    expected = tokens_of(engine, PREFIX[:37])
    engine.clear_cache()
    started = threading.Event()
    holder = threading.Thread(target=lambda: engine._loop.call(started.wait))
    holder.start()  # both prompts wait until both are there, so that one step computes them
    streams = [
        engine.submit(prompt, SamplingParams(n=n, max_tokens=m, temperature=0, ignore_eos=True))
        for prompt, n, m in ((PREFIX[40:77], 1, 0), (PREFIX[:37], 2, 6))
    ]
    started.set()
    holder.join()
    choices: dict[int, list[int]] = {}
    for delta in list(streams[1]):
        choices.setdefault(delta.index, []).extend(delta.token_ids)
    assert choices == {0: expected, 1: expected}


def test_each_choice_is_what_its_seed_gives_alone(llama_engine):
    engine = llama_engine()
    prompt = PREFIX[:37]
    together = list(engine.generate([prompt], SamplingParams(max_tokens=8, seed=3, n=3, ignore_eos=True)))
    for index in range(3):
        alone = tokens_of(engine, prompt, SamplingParams(max_tokens=8, seed=3 + index, ignore_eos=True))
        assert list(together[index].token_ids) == alone
    assert len({c.token_ids for c in together}) == 3


def test_a_request_draws_the_same_whatever_runs_beside_it(llama_engine):
    engine = llama_engine()
    params = SamplingParams(max_tokens=12, temperature=1.5, top_p=0.9, seed=5, ignore_eos=True)
    alone = tokens_of(engine, PREFIX[:30], params)
    noise = [engine.submit(PREFIX[: 20 + i], SamplingParams(max_tokens=20, ignore_eos=True)) for i in range(6)]
    assert tokens_of(engine, PREFIX[:30], params) == alone
    for stream in noise:
        list(stream)


def test_logprobs_are_the_models(llama_engine, models):
    engine = llama_engine()
    reference = models("llama")[1]._model
    (completion,) = engine.generate([PREFIX], SamplingParams(max_tokens=3, temperature=0, logprobs=2, ignore_eos=True))
    ids = torch.tensor([PREFIX + list(completion.token_ids)])
    with torch.inference_mode():
        expected = torch.log_softmax(reference(ids).logits[0, len(PREFIX) - 1 :], -1)
    for row, logprob in enumerate(completion.logprobs):
        assert logprob.logprob == pytest.approx(float(expected[row, logprob.token_id]), abs=1e-4)
        assert logprob.top[0] == (logprob.token_id, logprob.logprob)


# -- ends ------------------------------------------------------------------------------------------------------------


def test_stop_tokens_and_the_models_end_of_sequence(llama_engine):
    engine = llama_engine()
    free = tokens_of(engine, PREFIX, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    cut = free.index(free[3])
    (completion,) = engine.generate(
        [PREFIX], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, stop_token_ids=[free[3]])
    )
    assert (list(completion.token_ids), completion.finish_reason) == (free[: cut + 1], "stop")
    force_eos = SamplingParams(max_tokens=8, temperature=0, logit_bias={2: 100.0})
    (completion,) = engine.generate([PREFIX], force_eos)
    assert (completion.token_ids, completion.finish_reason) == ((2,), "stop")


def test_max_tokens_none_fills_the_context(llama_engine):
    engine = llama_engine()
    (completion,) = engine.generate([PREFIX], SamplingParams(max_tokens=None, temperature=0, ignore_eos=True))
    assert len(PREFIX) + len(completion.token_ids) == engine.max_model_len
    assert completion.finish_reason == "length"


def test_stop_strings_end_the_text(demo_engine):
    prompt = demo_engine.encode("The code of")
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    (free,) = demo_engine.generate([prompt], params)
    stop = free.text[5:8]
    (cut,) = demo_engine.generate([prompt], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, stop=[stop]))
    assert cut.text == free.text[: free.text.find(stop)]
    assert cut.finish_reason == "stop"


# -- cancellation and streams ----------------------------------------------------------------------------------------


def until_idle(engine):
    until(lambda: (engine.stats().running, engine.stats().waiting) == (0, 0))


def test_cancelling_frees_everything_but_the_cache(llama_engine):
    engine = llama_engine()
    stream = engine.submit(PREFIX, SamplingParams(max_tokens=None, ignore_eos=True, n=3))
    next(iter(stream))
    stream.cancel()
    stream.cancel()
    until_idle(engine)
    stats = engine.stats()
    assert stats.store.private_chunks == 0
    assert stats.store.cached_chunks >= 5


def test_leaving_a_with_block_cancels(llama_engine):
    engine = llama_engine()
    with engine.submit(PREFIX, SamplingParams(max_tokens=None, ignore_eos=True)) as stream:
        next(iter(stream))
    until_idle(engine)


def test_dropping_generates_iterator_cancels_the_rest(llama_engine):
    engine = llama_engine()
    completions = engine.generate([PREFIX[:9], PREFIX], SamplingParams(max_tokens=100, ignore_eos=True))
    next(completions)
    del completions
    gc.collect()
    until_idle(engine)


def test_async_streams(llama_engine):
    engine = llama_engine()
    expected = tokens_of(engine, PREFIX)

    async def read(stream):
        return [token async for delta in stream for token in delta.token_ids]

    async def main():
        return await asyncio.gather(*(read(engine.submit(PREFIX, GREEDY)) for _ in range(5)))

    assert asyncio.run(main()) == [expected] * 5


def test_a_reader_whose_event_loop_is_gone_cancels_its_request(llama_engine):
    engine = llama_engine()
    stream = engine.submit(PREFIX, SamplingParams(max_tokens=None, ignore_eos=True))

    async def read_one():
        async for _ in stream:
            return

    asyncio.run(read_one())
    until_idle(engine)


def test_many_threads(llama_engine):
    engine = llama_engine()
    expected = [tokens_of(engine, PREFIX[: 20 + i]) for i in range(4)]
    got = {}

    def work(thread):
        got[thread] = [tokens_of(engine, PREFIX[: 20 + (thread + i) % 4]) for i in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread, results in got.items():
        assert results == [expected[(thread + i) % 4] for i in range(4)]


# -- bad input and failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([128], {}, "prompt"),
        ([1.5], {}, "prompt"),
        ([True], {}, "prompt"),
        ([5], {"logit_bias": {128: 1.0}}, "logit_bias"),
        ([5], {"stop_token_ids": [128]}, "stop_token_ids"),
        ([5], {"stop": ["x"]}, "stop"),
    ],
)
def test_bad_requests_are_refused_at_once(llama_engine, prompt, params, param):
    engine = llama_engine()
    with pytest.raises(InvalidRequestError) as caught:
        engine.submit(prompt, SamplingParams(**params))
    assert caught.value.param == param
    assert len(tokens_of(engine, PREFIX)) == 6


def test_lengths_beyond_the_model_or_the_pool(llama_engine):
    engine = llama_engine()
    assert engine.max_model_len == 256
    with pytest.raises(ContextLengthError, match="this model's maximum context length is 256 tokens"):
        engine.submit([5] * 256)
    with pytest.raises(ContextLengthError, match="max_tokens=200") as caught:
        engine.submit([5] * 100, SamplingParams(max_tokens=200))
    assert caught.value.code == "context_length_exceeded"
    small = llama_engine(pool_bytes=engine._runner.layout.bytes_per_chunk * 3)
    assert small.max_model_len == 48
    with pytest.raises(ContextLengthError, match="pool"):
        small.submit([5] * 48)
    assert len(tokens_of(small, [5] * 42)) == 6


def test_one_bad_prompt_of_many_starts_none(llama_engine):
    engine = llama_engine()
    with pytest.raises(InvalidRequestError):
        engine.generate([PREFIX, [999]], GREEDY)
    until_idle(engine)


def test_text_needs_a_tokenizer(llama_engine):
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        llama_engine().generate(["hello"])


def test_a_step_that_fails_ends_its_requests_and_nothing_else(llama_engine, caplog):
    engine = llama_engine()
    run, failures = engine._runner.run, [True]

    def failing(step):
        logits = run(step)
        if failures.pop() if failures else False:
            raise RuntimeError("out of memory")
        return logits

    engine._runner.run = failing
    with pytest.raises(EngineError, match="out of memory"):
        tokens_of(engine, PREFIX)
    assert "a step failed" in caplog.text
    engine.check()
    # What the failed step wrote was never published.
    (completion,) = engine.generate([PREFIX], GREEDY)
    assert completion.usage.cached_tokens == 0


def test_a_broken_model_gives_an_error_and_no_text():
    broken = random_models("llama")[0]
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with Engine.from_model(broken, pool_bytes=1 << 20) as engine:
        with pytest.raises(EngineError, match="NaN"):
            tokens_of(engine, PREFIX)
        engine.check()
        assert engine.stats().store.leases == 0


def test_a_closed_engine_says_so(models):
    engine = Engine.from_model(models("llama")[0], pool_bytes=1 << 20)
    stream = engine.submit(PREFIX, SamplingParams(max_tokens=None, ignore_eos=True))
    next(iter(stream))
    engine.close()
    engine.close()
    with pytest.raises(EngineClosedError):
        list(stream)
    for use in (lambda: engine.submit([5]), engine.stats, engine.check):
        with pytest.raises(EngineClosedError):
            use()


def test_when_the_thread_dies_everybody_is_told(models, caplog):
    engine = Engine.from_model(models("llama")[0], pool_bytes=1 << 20)

    def die():
        raise AssertionError("a bug of ours")

    engine._loop.scheduler.schedule = die
    stream = engine.submit(PREFIX)
    with pytest.raises(EngineClosedError, match="a bug of ours"):
        list(stream)
    with pytest.raises(EngineClosedError, match="a bug of ours"):
        engine.submit(PREFIX)
    assert "the engine's thread died" in caplog.text
    engine.close()
