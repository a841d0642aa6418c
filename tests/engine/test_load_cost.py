"""Loading against computing: lines are found, estimates stay sane, and loading is tried again."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.engine.cost import CostSurface
from stemcache.engine.load_cost import TRY_EVERY, Line, LoadCost

SETTINGS = settings(max_examples=60)
observations = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=40)


def cost_of(per_token: float = 1e-4) -> LoadCost:
    """The estimates of an engine whose steps took so long."""
    surface, random = CostSurface(), Random(1)
    for _ in range(64):
        new = random.choice([64, 256, 1024])
        surface.observe([(0, new)], 1e-3 + per_token * new)
    return LoadCost(1024, surface)


@pytest.mark.parametrize(("fixed", "slope"), [(0.01, 1e-5), (0.0, 1e-3), (0.5, 0.0)])
def test_a_line_is_found(fixed: float, slope: float) -> None:
    line, random = Line.through(1024, 1.0, 1.0), Random(2)
    for _ in range(400):
        amount = random.randrange(64, 4096)
        line.observe(amount, fixed + slope * amount)
    for amount in (64, 1000, 4096):
        assert line.at(amount) == pytest.approx(fixed + slope * amount, rel=1e-3, abs=1e-4)


def test_a_line_follows_what_changes() -> None:
    line = Line.through(1024, 0.0, 1e-4)
    for seconds_per_token in (1e-4, 1e-2):
        for amount in (100, 1000) * 100:
            line.observe(amount, seconds_per_token * amount)
    assert line.at(1000) == pytest.approx(10.0, rel=0.01)


@SETTINGS
@given(observations, st.floats(0, 1e6))
def test_estimates_are_finite_not_negative_and_grow(seen: list[tuple[float, float]], amount: float) -> None:
    line = Line.through(1024, 0.002, 1e-6)
    for x, seconds in seen:
        line.observe(x, seconds)
    assert math.isfinite(line.at(amount))
    assert 0.0 <= line.at(0) <= line.at(amount) * (1 + 1e-9) + 1e-9


def test_before_anything_was_observed_loading_is_tried() -> None:
    cost = LoadCost(1024, CostSurface())
    assert cost.advises("disk", 0, 1024)
    surface = CostSurface()
    for _ in range(100):
        surface.observe([(1000, 1)], 0.1)  # decoding alone: a token of a prompt does not cost a tenth of a second
    assert LoadCost(1024, surface).compute_seconds(0, 1000) == cost.compute_seconds(0, 1000)


def test_the_cheaper_is_advised_for_each_tier() -> None:
    cost = cost_of(per_token=1e-4)
    for _ in range(50):
        for n_tokens in (256, 1024):
            cost.loaded("fast", n_tokens, 1e-6 * n_tokens)
            cost.loaded("slow", n_tokens, 1e-2 * n_tokens)
    assert cost.advises("fast", 0, 1024)
    assert not cost.advises("slow", 0, 1024)
    assert cost.load_seconds("slow", 1024) == pytest.approx(10.24, rel=0.05)
    assert cost.compute_seconds(0, 1024) == pytest.approx(0.1034, rel=0.05)


def test_a_tier_that_was_slow_is_tried_again() -> None:
    cost = cost_of()
    for _ in range(20):
        cost.loaded("redis", 1024, 60.0)
    for _ in range(3):
        assert [cost.advises("redis", 0, 1024) for _ in range(TRY_EVERY + 1)] == [False] * TRY_EVERY + [True]
