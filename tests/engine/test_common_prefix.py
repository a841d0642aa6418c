"""The common prefix, against comparing one element after the other."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.engine.common_prefix import common_prefix


@settings(max_examples=300)
@given(shared=st.text("ab", max_size=20), one=st.text("ab", max_size=9), other=st.text("ab", max_size=9))
def test_it_ends_at_the_first_difference(shared: str, one: str, other: str) -> None:
    one, other = shared + one, shared + other
    expected = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
    assert common_prefix(one, other) == common_prefix([*one], [*other]) == expected
