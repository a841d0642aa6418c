"""The order of documents: nothing lost, nothing moved too far, and the cached way taken."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.ragcache.order import cache_order

SETTINGS = settings(max_examples=100)
LETTERS = "abcde"
letters = st.permutations(LETTERS).flatmap(lambda p: st.integers(0, len(p)).map(lambda n: "".join(p[:n])))


class Tree:
    """What is cached, as plain strings: a letter is a document of ten tokens."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self.n_lookups = 0

    def resident(self, path: Sequence[str]) -> int:
        self.n_lookups += 1
        text = "".join(path)
        return 10 * max(
            (n for cached in self.paths for n in range(len(text) + 1) if cached[:n] == text[:n]),
            default=0,
        )


def by_letter(document: str) -> float:
    return -ord(document)


def order(documents: str, cached: Sequence[str], popular: str = LETTERS, **options: int) -> str:
    return "".join(cache_order(list(documents), Tree(cached).resident, lambda d: -popular.index(d), **options))


def test_it_walks_down_what_is_cached() -> None:
    assert order("abc", ["cab"]) == "cab"
    assert order("abc", ["cba", "cx"]) == "cba"
    assert order("bca", ["ca"]) == "cab", "what is not cached follows by popularity"


def test_popularity_decides_between_equals_and_relevance_between_equally_popular() -> None:
    assert order("bca", ["b", "c"], popular="cbade") == "cba"
    assert order("cab", [], popular="bcade") == "bca"
    assert cache_order(list("cab"), Tree([]).resident, lambda _: 1.0) == list("cab")


def test_a_popular_document_does_not_cut_the_walk_short() -> None:
    assert order("abc", ["bc"], popular="acbde") == "bca"


def test_what_comes_together_stands_together() -> None:
    """Where nothing is cached any more; the walk itself follows popularity."""

    def together(one: str, other: str) -> float:
        return {"bd": 2.0, "dc": 1.0}.get(one + other, 0.0)

    def ordered(documents: str, cached: Sequence[str]) -> str:
        return "".join(cache_order(list(documents), Tree(cached).resident, by_letter, together=together))

    assert ordered("dcba", []) == "abdc"
    assert ordered("dcba", ["b"]) == "bdca"
    assert ordered("dcba", ["ba", "bd"]) == "bacd", "of what is cached the most popular, as it is found more often"


def test_a_few_shared_tokens_are_no_document() -> None:
    """Every document begins with the same ten tokens here; only a whole chunk more counts."""

    def resident(path: Sequence[str]) -> int:
        return 10 + 64 * ("".join(path) == "b") + 3 * ("".join(path) == "c")

    assert cache_order(list("abc"), resident, by_letter, min_gain=64) == list("bac")
    assert cache_order(list("cab"), lambda path: 3 * (path == ["c"]), by_letter, min_gain=64) == list("abc")


@SETTINGS
@given(letters, st.lists(letters, max_size=4), st.permutations(LETTERS), st.integers(0, 5))
def test_nothing_is_lost_or_moved_too_far(documents: str, cached: list[str], popular: list[str], shift: int) -> None:
    found = order(documents, cached, "".join(popular), max_shift=shift)
    assert sorted(found) == sorted(documents)
    assert all(abs(found.index(d) - documents.index(d)) <= shift for d in documents)
    if shift == 0:
        assert found == documents


@SETTINGS
@given(letters, letters, st.integers(0, 5))
def test_a_single_cached_path_is_used_as_far_as_the_bound_lets_it(documents: str, path: str, shift: int) -> None:
    """Against all permutations within the bound. (With several paths greedy may take the shorter one: a popular first
    document wins over a longer way behind another.)"""
    tree = Tree([path])
    allowed = [
        p for p in permutations(documents) if all(abs(p.index(d) - documents.index(d)) <= shift for d in documents)
    ]
    best = max(tree.resident(p) for p in allowed)
    assert tree.resident(order(documents, [path], max_shift=shift)) == best


@SETTINGS
@given(letters, st.lists(letters, max_size=4))
def test_the_number_of_lookups_is_bounded(documents: str, cached: list[str]) -> None:
    tree = Tree(cached)
    cache_order(list(documents), tree.resident, by_letter)
    n = len(documents)
    assert tree.n_lookups <= 1 + n * (n + 1) // 2


def test_equal_documents_are_kept_apart() -> None:
    assert cache_order(["a", "b", "a"], Tree(["ba"]).resident, by_letter) == ["b", "a", "a"]


@pytest.mark.parametrize(("options", "message"), [({"max_shift": -1}, "negative"), ({"min_gain": 0}, "at least 1")])
def test_bad_bounds_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order("ab", [], **options)
