"""The cost surface: it finds the coefficients of made-up steps, and predicts recorded ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.engine.cost import CostSurface

SETTINGS = settings(max_examples=60)
RECORDED = Path(__file__).parent / "step_times.json"
Work = list[tuple[int, int]]

entries = st.tuples(st.integers(0, 100_000), st.integers(1, 4_096))
steps = st.lists(st.tuples(st.lists(entries, min_size=1, max_size=4), st.floats(1e-9, 1e9)), max_size=40)


def some_work(random: Random) -> Work:
    """Decoding of several sequences, a piece of a prompt, or both."""
    decoding = [(random.randrange(4_000), 1) for _ in range(random.choice([0, 1, 8]))]
    prefill = [(random.choice([0, 512, 2_048]), random.choice([32, 300, 1_024]))] if random.random() < 0.5 else []
    return decoding + prefill or [(0, 64)]


def true_seconds(work: Work, base: float, per_token: float, per_pair: float) -> float:
    pairs = sum(cached + place + 1 for cached, new in work for place in range(new))
    return base + per_token * sum(new for _, new in work) + per_pair * pairs


@pytest.mark.parametrize(
    "truth", [(5e-3, 2e-5, 1e-9), (0.0, 1e-4, 3e-9), (2e-2, 0.0, 1e-8), (1e-3, 1e-3, 0.0), (1e-9, 1e-12, 1e-15)]
)
def test_exact_times_give_the_exact_coefficients(truth: tuple[float, float, float]) -> None:
    random, surface = Random(1), CostSurface()
    for _ in range(320):
        work = some_work(random)
        surface.observe(work, true_seconds(work, *truth))
    assert surface.coefficients == pytest.approx(truth, rel=1e-3, abs=1e-4 * max(truth) * 1e-3)
    assert surface.seconds(700, 200) == pytest.approx(true_seconds([(700, 200)], *truth), rel=1e-3)


def test_noise_and_disturbed_steps_do_not_matter_much() -> None:
    """A tenth of the steps take up to twenty times as long, the others a few per cent more or less."""
    random, surface, truth = Random(2), CostSurface(), (5e-3, 2e-5, 2e-9)
    for _ in range(2_000):
        work = some_work(random)
        noise = random.uniform(3, 20) if random.random() < 0.1 else random.lognormvariate(0, 0.05)
        surface.observe(work, noise * true_seconds(work, *truth))
    for cached, new in [(0, 64), (0, 2_048), (4_000, 64), (4_000, 1_024)]:
        assert surface.seconds(cached, new) == pytest.approx(true_seconds([(cached, new)], *truth), rel=0.12)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    """Within a fifth: kinds of steps that have not come again are still remembered as they were."""
    random, surface = Random(3), CostSurface()
    for factor in (1.0, 3.0):
        for _ in range(3_000):
            work = some_work(random)
            surface.observe(work, factor * true_seconds(work, 5e-3, 2e-5, 2e-9))
    assert surface.seconds(512, 512) == pytest.approx(3 * true_seconds([(512, 512)], 5e-3, 2e-5, 2e-9), rel=0.2)


def test_many_decoding_steps_do_not_drown_the_prefills() -> None:
    surface = CostSurface()
    for _ in range(20):
        for cached, new in [(0, 1_000), (2_000, 1_000)]:
            surface.observe([(cached, new)], true_seconds([(cached, new)], 5e-3, 2e-5, 2e-9))
    for _ in range(5_000):
        surface.observe([(100, 1)], 6e-3)  # a little more than the truth, 5e-3
    assert surface.seconds(1_000, 1_000) == pytest.approx(true_seconds([(1_000, 1_000)], 5e-3, 2e-5, 2e-9), rel=0.1)


@SETTINGS
@given(steps, st.integers(0, 1 << 20), st.integers(1, 1 << 16))
def test_whatever_it_is_told_more_work_is_not_cheaper(seen: list[tuple[Work, float]], cached: int, new: int) -> None:
    surface = CostSurface()
    for work, seconds in seen:
        surface.observe(work, seconds)
    assert all(math.isfinite(value) and value >= 0 for value in surface.coefficients)
    assert surface.seconds(cached, new) <= surface.seconds(cached + 1, new) <= surface.seconds(cached + 1, new + 1)
    assert surface.relative(0) == 1
    assert 1 <= surface.relative(cached) < math.inf


def test_before_the_first_step_all_tokens_cost_the_same() -> None:
    surface = CostSurface()
    for seconds in (0.0, -1.0, math.nan, math.inf):
        surface.observe([(0, 10)], seconds)
    assert surface.observed == 0
    assert surface.seconds(100, 100) == 0
    assert surface.relative(100_000) == 1


def test_recorded_steps_are_predicted() -> None:
    """Steps of a real model on a busy machine: learned from the first half, tried on the second."""
    recorded = json.loads(RECORDED.read_text())["steps"]
    half = len(recorded) // 2
    surface = CostSurface()
    for work, seconds in recorded[:half]:
        surface.observe([(cached, new) for cached, new in work], seconds)
    base, per_token, per_pair = surface.coefficients
    factors = [seconds / true_seconds(work, base, per_token, per_pair) for work, seconds in recorded[half:]]
    assert 0.6 < median(factors) < 1.7
    assert sum(0.5 < factor < 2 for factor in factors) > 0.6 * len(factors)
    slowest = max(recorded[half:], key=lambda step: sum(new for _, new in step[0]))
    assert sum(new for _, new in slowest[0]) > 1_000, "the record has long prefills"
