"""Demand against plain counts, and that what was asked for reaches the engine with the prompts."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache import SamplingParams
from stemcache.engine.demo.facts import random_corpus
from stemcache.engine.engine import Engine
from stemcache.prefixtree.expected import Expected
from stemcache.ragcache.demand import Demand
from stemcache.ragcache.documents import Document
from stemcache.ragcache.preparation import Space, Wish

SETTINGS = settings(max_examples=60)
EVENTS = st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(1, 6), max_size=4)), max_size=30)


@SETTINGS
@given(EVENTS, st.one_of(st.floats(3, 60), st.just(1e6)))
def test_counts_fade_and_nobody_sees_anothers(events: list[tuple[str, list[int]]], half_life: float) -> None:
    """With half-lives so short that much is dropped, and so long that nothing is."""
    demand, plain = Demand(half_life), Counter[tuple[str, tuple[int, ...]]]()
    for whose, keys in events:
        demand.count(whose, keys)
        asked = sorted(set(keys))
        plain.update((whose, group) for n in (1, 2) for group in combinations(asked, n))
        plain = Counter({group: n * 0.5 ** (len(asked) / half_life) for group, n in plain.items()})
    for whose in "ab":
        for group in [(key,) for key in range(1, 7)] + list(combinations(range(1, 7), 2)):
            found, right = demand.of(whose, *reversed(group)), plain[whose, group]
            if half_life == 1e6:
                assert found == pytest.approx(right)
            assert right - 1 / 3 <= found * (1 + 1e-9), "less than 1/4 is dropped at a time, two half-lives apart"
            assert found <= right * (1 + 1e-9)


def test_what_is_gone_is_forgotten_and_the_rest_is_not() -> None:
    demand = Demand()
    demand.count("a", [1, 2, 3])
    demand.forget([2])
    assert [demand.of("a", *keys) > 0 for keys in [(1,), (2,), (3,), (1, 2), (1, 3), (2, 3)]] == [
        True, False, True, False, True, False,
    ]  # fmt: skip


def test_memory_is_bounded() -> None:
    demand = Demand(half_life=100)
    for request in range(3_000):
        demand.count("a", range(5 * request, 5 * request + 5))
        assert len(demand._counts) <= 4 * 100 * 3, "four half-lives of 100 documents, each with two pairs"
    demand.count("a", range(100_000, 100_100))
    assert demand.of("a", 100_000, 100_001) > 0
    assert demand.of("a", 100_000, 100_099) == 0, "of very many documents not all pairs are counted"


def test_a_prompt_is_expected_as_often_as_its_first_documents_were_asked_for() -> None:
    demand = Demand(half_life=1e9)
    for keys in ([1, 2], [2, 1, 3], [1], [3, 4]):
        demand.count("a", keys)
    expected = demand.expected("a", [1, 2, 3], [10, 20, 30])
    assert [expected.of(n) for n in (1, 10, 11, 20, 21, 30)] == pytest.approx([3, 3, 2, 2, 0, 0], rel=1e-6)
    assert demand.expected("a", [1, 2], [10, 10]).of(10) == pytest.approx(2, rel=1e-6)
    assert demand.expected("b", [1, 2], [10, 20]).of(5) == 0
    assert demand.expected("a", [], []).of(1) == 0


@pytest.mark.parametrize("speculate", [False, True])
def test_the_engine_is_told(engine: Engine, cache_of, monkeypatch: pytest.MonkeyPatch, speculate: bool) -> None:
    """Every question counts once, also where it was composed more often."""
    told: list[Expected] = []
    submit = engine.submit

    def submit_and_note(*args, expected: Expected, **options):
        told.append(expected)
        return submit(*args, expected=expected, **options)

    monkeypatch.setattr(engine, "submit", submit_and_note)
    cache, corpus = cache_of(speculate=speculate), random_corpus(Random(31), 6)
    cache.add([Document(id=each.title, title=each.title, text=each.text) for each in corpus])
    params = SamplingParams(max_tokens=2, temperature=0)
    for n in range(3):
        cache.ask(corpus[0].facts[0].question, k=2, params=params)
        assert [round(told[-1].of(tokens), 2) for tokens in (20, 10_000)] == [n, 0]


def test_documents_follow_those_that_they_came_with(engine: Engine, cache_of) -> None:
    cache, wish, messages = cache_of(), Wish(order="cache"), [{"role": "user", "content": "What is here?"}]
    a, b, c = ((name, f"Here is {name}.") for name in ("a", "b", "c"))
    for asked in [[a, c]] * 2 + [[a]] * 3 + [[b]] * 3:
        cache.prepare_given(messages, asked, wish)
    found = cache.prepare_given(messages, [b, c, a], wish).retrieved
    assert [each.passage.title for each in found] == ["a", "c", "b"], "b alone was asked for more often than c"


def test_another_tenants_questions_do_not_order_ones_documents(engine: Engine, cache_of) -> None:
    """Documents that are nobody's are told by their content, which two tenants may both have."""
    cache, given = cache_of(), [("first", "Here is one thing."), ("second", "Here is another thing.")]
    wish, messages = Wish(order="cache"), [{"role": "user", "content": "What is here?"}]
    for _ in range(3):
        cache.prepare_given(messages, [given[1]], wish, space=Space(tenant=b"alice"))
    orders = [
        [each.passage.title for each in cache.prepare_given(messages, given, wish, space=Space(tenant=who)).retrieved]
        for who in (b"bob", b"alice")
    ]
    assert orders == [["first", "second"], ["second", "first"]]
