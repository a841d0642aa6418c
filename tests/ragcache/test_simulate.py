"""The simulator: hits against plain computation, bounds against exhaustive search, the reordering of requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.ragcache.simulate import GRAIN, HitRates, Setup, Simulation
from stemcache.ragcache.simulate_bounds import belady, order_free
from stemcache.ragcache.simulate_report import BOUNDS, SETUPS, as_json, compare, merge, table
from stemcache.ragcache.simulate_trace import Trace, TraceError
from stemcache.ragcache.simulate_workload import Workload

SETTINGS = settings(max_examples=40)
C = 8  # tokens per chunk: a made-up token stands for two
SMALL = Workload(n_documents=300, n_requests=200, k=3, mean_tokens=40, sigma=0.5, drift_top=30, drift_replaced=6)

requests = st.lists(
    st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True).map(tuple), min_size=1, max_size=12
)


def trace_of(requests: Sequence[tuple[int, ...]], lengths: Sequence[int], question: int = 5) -> Trace:
    return Trace("test", lengths, requests, [question] * len(requests), system_tokens=0, orderable=True)


def run(trace: Trace, setup: Setup = SETUPS[0], chunks: int = 10_000) -> HitRates:
    simulation = Simulation(trace, setup, capacity_tokens=chunks * C, chunk_tokens=C)
    rates = simulation.run()
    simulation.store.check()
    stats = simulation.store.stats()
    assert (stats.leases, stats.private_chunks) == (0, 0)
    return rates


@SETTINGS
@given(requests, st.lists(st.integers(2 * C, 5 * C), min_size=4, max_size=4))
def test_with_room_for_everything_what_was_seen_is_hit(asked: list[tuple[int, ...]], lengths: list[int]) -> None:
    """A document is hit if an earlier request began with the same documents up to it."""
    seen: set[tuple[int, ...]] = set()
    hits = 0
    for documents in asked:
        prefixes = [documents[:end] for end in range(1, len(documents) + 1)]
        hits += sum(prefix in seen for prefix in prefixes)
        seen.update(prefixes)
    rates = run(trace_of(asked, lengths))
    assert rates.hit_documents == hits
    assert rates.documents == sum(map(len, asked))
    assert rates.tokens == sum(-(-lengths[d] * GRAIN // C) for documents in asked for d in documents)


def best_hits(asked: Sequence[tuple[int, ...]], capacity: int, *, ordered: bool) -> int:
    """The most pieces that any cache can hit, by trying all contents after every request. A document is one piece."""
    pieces = [
        [documents[:end] for end in range(1, len(documents) + 1)] if ordered else [(d,) for d in documents]
        for documents in asked
    ]

    @cache
    def best(at: int, cached: frozenset[tuple[int, ...]]) -> int:
        if at == len(pieces):
            return 0
        hits = 0
        for piece in pieces[at]:
            if piece not in cached:
                if ordered:
                    break
                continue
            hits += 1
        have = sorted(cached | set(pieces[at]))
        choices = combinations(have, min(capacity, len(have)))
        return hits + max(best(at + 1, frozenset(choice)) for choice in choices)

    return best(0, frozenset())


@SETTINGS
@given(requests.map(lambda r: r[:7]), st.integers(1, 3))
def test_the_bounds_are_the_best_there_is(asked: list[tuple[int, ...]], chunks: int) -> None:
    trace = trace_of(asked, [C] * 4, question=0)
    for bound, ordered in ((belady, True), (order_free, False)):
        rates = bound(trace, capacity_tokens=chunks * C, chunk_tokens=C)
        assert rates.hit_tokens == GRAIN * best_hits(asked, chunks, ordered=ordered)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("drift", [0, 50])
def test_nothing_is_better_than_its_bound(seed: int, drift: int) -> None:
    trace = replace(SMALL, drift_every=drift).draw(seed)
    bounds = [bound(trace, capacity_tokens=100 * C, chunk_tokens=C).token_rate for bound in BOUNDS.values()]
    assert 0 < bounds[0] < bounds[1] < 1
    for setup in SETUPS:
        rate = run(trace, setup, chunks=100).token_rate
        assert 0 < rate <= bounds[setup.order == "cache"], setup.name


def test_policies_and_orders_do_what_they_are_for() -> None:
    """On one trace; how much they do it is for docs/policies.md."""
    trace = replace(SMALL, n_requests=600).draw(1)
    setups = [
        Setup("lru"),
        Setup("pgdsf"),
        Setup("pgdsf+gate"),
        Setup("pgdsf+gate", order="cache", max_shift=1),
        Setup("pgdsf+gate", order="cache"),
    ]
    rates = [run(trace, setup, chunks=150).document_rate for setup in setups]
    assert rates == sorted(set(rates)), "each is better than the one before"
    assert run(trace, Setup("lru", order="cache", max_shift=0), chunks=150).document_rate == rates[0]


def test_requests_are_put_in_the_order_of_what_is_cached() -> None:
    """RAGCache's example: room for one document, and questions that alternate between two."""
    trace = trace_of([(0,), (1,)] * 60, [10 * C, 10 * C], question=1)
    assert run(trace, chunks=12).hit_documents == 0
    waiting = run(trace, Setup(queue="cache", backlog=8), chunks=12)
    assert waiting.hit_documents > 60


def test_nobody_waits_for_ever() -> None:
    """One request for another document among a stream for a cached one: it is overtaken 32 times, not more."""
    trace = trace_of([(0,), (1,), *[(0,)] * 100], [10 * C, 10 * C])
    served: list[int] = []
    simulation = Simulation(trace, Setup(queue="cache", backlog=4), capacity_tokens=12 * C, chunk_tokens=C)
    serve = simulation._serve

    def noted(index: int) -> None:
        served.append(index)
        serve(index)

    simulation._serve = noted  # type: ignore[method-assign]
    simulation.run()
    assert served.index(1) == 33
    assert sorted(served) == list(range(102))


def test_what_is_longer_than_the_cache_is_missed_and_harms_nobody() -> None:
    rates = run(trace_of([(0,), (1,), (0,)], [2 * C, 50 * C]), chunks=12)
    assert (rates.documents, rates.hit_documents) == (3, 1)


@pytest.mark.parametrize(("capacity", "chunk"), [(7, 8), (100, 3)])
def test_a_cache_without_a_chunk_is_refused(capacity: int, chunk: int) -> None:
    with pytest.raises(TraceError, match="has no chunk"):
        Simulation(trace_of([(0,)], [1]), SETUPS[0], capacity_tokens=capacity, chunk_tokens=chunk)


def test_workloads_are_as_skewed_as_they_say() -> None:
    """With an exponent of 1.073 the top 3 % of 1,000 documents are 60 % of all first documents (by arithmetic)."""
    trace = Workload(n_documents=1_000, k=1, zipf=1.073, n_requests=8_000, sigma=0.5).draw(3)
    counts = Counter(request[0] for request in trace.requests)
    assert 0.57 < sum(count for _, count in counts.most_common(30)) / 8_000 < 0.63
    assert 3_500 < sum(trace.lengths) / len(trace.lengths) < 3_900


def test_a_seed_names_a_trace() -> None:
    assert SMALL.draw(5) == SMALL.draw(5) != SMALL.draw(6)
    assert all(len(set(request)) == 3 for request in SMALL.draw(5).requests)


def test_drift_changes_what_is_popular() -> None:
    drifting = Workload(
        n_documents=300, n_requests=2_000, k=1, drift_every=1_000, drift_top=30, drift_replaced=30, shuffled=0
    )
    first, second = drifting.draw(1).requests[:1_000], drifting.draw(1).requests[1_000:]
    popular = max(set(first), key=first.count)
    assert first.count(popular) > 100 > second.count(popular)


@pytest.mark.parametrize("change", [{"k": 21}, {"k": 0}, {"topic_size": 301}, {"drift_top": 200, "drift_every": 1}])
def test_impossible_workloads_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Workload(**{"n_documents": 300, **change})


def test_a_comparison_as_table_and_data() -> None:
    draws = {"one": SMALL.draw, "two": SMALL.draw}
    served: list[None] = []
    figures = compare(
        draws,
        [1, 2],
        capacity_tokens=100 * C,
        chunk_tokens=C,
        setups=SETUPS[:2],
        on_request=lambda: served.append(None),
    )
    assert len(served) == 2 * 2 * 2 * SMALL.n_requests
    header, rows = table(figures)
    assert [row[0] for row in rows] == ["lru", "lfu", *BOUNDS]
    assert all(len(row) == len(header) == 7 for row in rows)
    assert rows[0][1] == rows[0][4], "the same traces give the same figures"
    assert rows[0][2] == "1.00x"
    expected = run(SMALL.draw(2), SETUPS[1], chunks=100).document_rate
    assert as_json(figures)[1]["document_rates"][1] == pytest.approx(expected, abs=1e-5)
    assert merge(figures) == figures


def test_merging_runs_of_several_seeds() -> None:
    rates = [
        compare({"w": SMALL.draw}, [seed], capacity_tokens=100 * C, chunk_tokens=C, setups=SETUPS[:1])
        for seed in (1, 2)
    ]
    together = compare({"w": SMALL.draw}, [1, 2], capacity_tokens=100 * C, chunk_tokens=C, setups=SETUPS[:1])
    assert merge([*rates[0], *rates[1]]) == together


def test_equal_histories_give_equal_figures() -> None:
    """Nothing depends on the process: no hash of strings, no time."""
    random = Random(4)
    asked = [tuple(random.sample(range(30), 2)) for _ in range(300)]
    trace = trace_of(asked, [3 * C] * 30)
    assert run(trace, SETUPS[-1], chunks=40) == run(trace, SETUPS[-1], chunks=40)
