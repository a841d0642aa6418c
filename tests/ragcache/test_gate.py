"""The gate's decisions, from made-up times of searches, steps and prompts."""

from __future__ import annotations

from random import Random

from stemcache.engine.cost import CostSurface
from stemcache.ragcache.gate import Gate


def gate_of(*, base, per_token, chunk_tokens=16, max_tokens=4096):
    """A gate over an engine whose steps take so many seconds, and a token more so many."""
    cost = CostSurface()
    for _ in range(20):
        for new in (1, 64, 512, 2048):
            cost.observe([(0, new)], base + per_token * new)
    return Gate(cost, chunk_tokens=chunk_tokens, max_tokens=max_tokens)


def test_nothing_is_guessed_before_a_search_was_seen():
    gate = gate_of(base=0.01, per_token=0.001)
    assert not gate.wants_stages()
    assert gate.step_tokens(0) == 0
    gate.searched([4.0], [True])
    assert gate.wants_stages()
    assert gate.step_tokens(0) == 0, "a search in one stage says nothing of stages"
    gate.searched([1.0, 1.0, 1.0, 1.0], [True] * 4)
    assert gate.step_tokens(0) > 0
    assert gate.step_tokens(4) == 0


def test_an_engine_that_has_computed_nothing_yet_is_left_alone():
    gate = Gate(CostSurface(), chunk_tokens=16, max_tokens=4096)
    gate.searched([1.0, 1.0], [True, True])
    assert not gate.wants_stages()
    assert gate.step_tokens(0) == 0


def test_a_step_ends_with_the_search():
    for seconds, tokens in ((0.02, 0), (0.04, 16), (0.08, 64), (1.0, 512), (2.2, 2048), (60.0, 4096)):
        gate = gate_of(base=0.01, per_token=0.001)
        gate.searched([0.1, seconds / 2, seconds / 2], [True] * 3)
        assert gate.step_tokens(0) == tokens
        assert gate.step_tokens(2) == 0, "then the search is over"


def test_fast_searches_are_left_whole():
    gate = gate_of(base=0.01, per_token=0.001)
    for _ in range(100):
        gate.searched([0.004], [True])
    assert not gate.wants_stages()
    for _ in range(100):
        gate.searched([1.0], [True])
    assert gate.wants_stages()


def test_stages_that_are_mostly_wrong_are_not_trusted():
    random = Random(0)
    gate = gate_of(base=0.01, per_token=0.001)
    gate.composed(0.05)
    for _ in range(200):
        gate.searched([0.1] * 4, [random.random() < share for share in (0.02, 0.6, 1.0, 1.0)])
    assert gate.step_tokens(0) == 0
    assert gate.step_tokens(1) > 0
    for _ in range(200):  # the documents are others now
        gate.searched([0.1] * 4, [True] * 4)
    assert gate.step_tokens(0) > 0
