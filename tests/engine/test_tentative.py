"""Tentative requests: alone they run, in short steps; for others they make way, and kept they are like any other."""

from __future__ import annotations

import threading
from random import Random

import pytest

from stemcache import SamplingParams
from stemcache.engine.tentative import Tentative

SHORT = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


def tokens_of(stream):
    return [token for delta in stream for token in delta.token_ids]


def prompt_of(random, n):
    return [random.randrange(1, 90) for _ in range(n)]


@pytest.fixture
def recorded(llama_engine):
    """An engine, and the tokens that each of its steps computes."""
    engine, steps = llama_engine(), []
    run = engine._runner.run

    def recording(step):
        steps.append(sum(entry.stop - entry.start for entry in step))
        return run(step)

    engine._runner.run = recording
    return engine, steps


class Held:
    """An engine that reads its inbox only when the block ends."""

    def __init__(self, engine):
        self._loop, self._go, self._reached = engine._loop, threading.Event(), threading.Event()

    def __enter__(self):
        self._loop._inbox.put(lambda: (self._reached.set(), self._go.wait()))
        self._reached.wait()

    def __exit__(self, *error):
        self._go.set()


def test_a_fate_is_decided_once():
    for first, second in (("keep", "drop"), ("drop", "keep")):
        tentative = Tentative(16)
        assert tentative.is_open
        assert getattr(tentative, first)()
        assert not getattr(tentative, second)()
        assert getattr(tentative, first)()
        assert not tentative.is_open


def test_alone_it_runs_in_short_steps(recorded):
    engine, steps = recorded
    prompt = prompt_of(Random(1), 100)
    tentative = Tentative(32)
    answer = tokens_of(engine.submit(prompt, SHORT, tentative=tentative))
    assert (tentative.keep(), steps[:4]) == (True, [32, 32, 32, 4])
    engine.clear_cache()
    assert tokens_of(engine.submit(prompt, SHORT)) == answer


def test_kept_it_goes_on_in_long_steps(recorded):
    engine, steps = recorded
    prompt = prompt_of(Random(2), 200)
    tentative = Tentative(16)
    with Held(engine):
        stream = engine.submit(prompt, SHORT, tentative=tentative)
        assert tentative.keep()
        other = engine.submit(prompt_of(Random(3), 20), SHORT)
    assert len(tokens_of(stream)) == len(tokens_of(other)) == 6
    assert steps[0] >= 200


def test_it_is_not_begun_beside_others(llama_engine):
    engine = llama_engine()
    tentative = Tentative(16)
    with Held(engine):
        other = engine.submit(prompt_of(Random(4), 40), SHORT)
        stream = engine.submit(prompt_of(Random(5), 40), SHORT, tentative=tentative)
    assert tokens_of(stream) == []
    assert not tentative.keep()
    assert len(tokens_of(other)) == 6
    assert stream.usage.cached_tokens == 0


@pytest.mark.parametrize("second_is_tentative", [False, True])
def test_it_gives_way_after_its_step_and_what_it_computed_stays(recorded, second_is_tentative):
    engine, steps = recorded
    prompt, tentative = prompt_of(Random(6), 160), Tentative(16)
    second = Tentative(16) if second_is_tentative else None
    run = engine._runner.run

    def submitting(step):
        if len(steps) == 3:
            others.append(engine.submit(prompt[:48] + [91], SHORT, tentative=second))
        return run(step)

    others, engine._runner.run = [], submitting
    stream = engine.submit(prompt, SHORT, tentative=tentative)
    if second_is_tentative:  # the first was there before
        assert len(tokens_of(stream)) == 6
        assert (tentative.keep(), second.keep(), tokens_of(others[0])) == (True, False, [])
        return
    assert tokens_of(stream) == []
    assert not tentative.keep()
    assert len(tokens_of(others[0])) == 6
    assert others[0].usage.cached_tokens == 48
    assert engine.cache.cached_tokens(prompt) == 64, "four steps were computed, and all of them stay"


def test_one_that_is_finished_is_not_lost(llama_engine):
    engine, tentative = llama_engine(), Tentative(16)
    stream = engine.submit(prompt_of(Random(7), 30), SHORT, tentative=tentative)
    answer = tokens_of(stream)
    tokens_of(engine.submit(prompt_of(Random(8), 30), SHORT))
    assert tentative.keep()
    assert len(answer) == 6


def test_random_arrivals(llama_engine):
    """Whatever comes when: those that were kept and the others answer as on an engine of their own."""
    engine, random = llama_engine(max_step_tokens=64), Random(9)
    prompts = [prompt_of(random, random.randint(1, 150)) for _ in range(40)]
    expected = [tokens_of(engine.submit(prompt, SHORT)) for prompt in prompts]
    engine.clear_cache()
    outcomes, streams = set(), []
    for number in range(120):
        which = random.randrange(len(prompts))
        tentative = Tentative(random.choice((1, 16, 40))) if random.random() < 0.5 else None
        stream = engine.submit(prompts[which], SHORT, tentative=tentative)
        if tentative is not None:
            for _ in range(random.choice((0, 0, 1, 3))):
                engine.stats()
            fate = random.choice((tentative.keep, tentative.drop))
            outcomes.add((fate.__name__, result := fate()))
            if (fate.__name__ == "keep") != result:
                stream.cancel()
                continue
        streams.append((which, stream))
        if number % 20 == 19:
            for each, answer in streams:
                assert tokens_of(answer) == expected[each]
            streams.clear()
    assert outcomes == {("keep", True), ("keep", False), ("drop", True)}
