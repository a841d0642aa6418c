"""The frequency sketch against plain counts."""

from __future__ import annotations

import hashlib
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.prefixtree.errors import InvariantError
from stemcache.prefixtree.frequency import FrequencySketch

SETTINGS = settings(max_examples=50)


def digest_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


KEYS = [digest_of(f"key {i}") for i in range(20)]


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(KEYS), st.floats(0.5, 3)), max_size=80), st.floats(0.1, 50))
def test_counts_fade(events: list[tuple[bytes, float]], half_life: float) -> None:
    """With room for all keys, each estimate is the sum of its counts, halved for every half-life that followed."""
    sketch, plain = FrequencySketch(64, half_life), dict.fromkeys(KEYS, 0.0)
    for key, count in events:
        sketch.add(key, count)
        plain[key] += count
        plain = {each: value * 0.5 ** (count / half_life) for each, value in plain.items()}
    sketch.check()
    for key in KEYS:
        assert sketch.estimate(key) == pytest.approx(plain[key], rel=1e-4, abs=1e-9)


@SETTINGS
@given(st.lists(st.integers(0, 400), max_size=800))
def test_it_never_counts_too_little(events: list[int]) -> None:
    """Far more keys than there is room for."""
    sketch = FrequencySketch(4, half_life=1e12)
    for event in events:
        sketch.add(digest_of(str(event)))
    for event in set(events):
        assert sketch.estimate(digest_of(str(event))) >= events.count(event) * (1 - 1e-4)


def test_estimates_of_many_keys_are_mostly_right() -> None:
    """At ten times the keys it was made for, popular ones are within a tenth."""
    random, sketch = Random(5), FrequencySketch(100, half_life=1e12)
    events = [min(int(random.paretovariate(0.8)), 1000) for _ in range(5000)]
    for event in events:
        sketch.add(digest_of(str(event)))
    popular = [event for event in set(events) if events.count(event) >= 20]
    assert len(popular) > 10
    for event in popular:
        assert sketch.estimate(digest_of(str(event))) <= 1.1 * events.count(event)


def test_it_goes_on_for_ever() -> None:
    """Past many times the range of a double's exponent."""
    sketch = FrequencySketch(4, half_life=1)
    for _ in range(5000):
        sketch.add(KEYS[0])
    sketch.check()
    assert sketch.estimate(KEYS[0]) == pytest.approx(1.0, rel=1e-4)  # 1/2 + 1/4 + ...
    assert sketch.estimate(KEYS[1]) == 0


def test_bad_sizes_are_refused() -> None:
    for n_keys, half_life in [(0, 1.0), (1, 0.0), (1, float("nan"))]:
        with pytest.raises(ValueError, match="positive"):
            FrequencySketch(n_keys, half_life)


def test_check_sees_a_broken_counter() -> None:
    sketch = FrequencySketch(1, 1)
    sketch._rows[2][0] = float("nan")
    with pytest.raises(InvariantError, match="finite"):
        sketch.check()
