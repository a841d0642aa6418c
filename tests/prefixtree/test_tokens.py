"""Token encoding: exact, and in token order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.prefixtree.tokens import TOKEN_BYTES, common_tokens, encode_tokens

ids = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)), max_size=6)


@settings(max_examples=300)
@given(ids, ids)
def test_order_and_prefixes_survive(left: list[int], right: list[int]) -> None:
    a, b = encode_tokens(left), encode_tokens(right)
    assert len(a) == TOKEN_BYTES * len(left)
    assert (a < b) == (left < right)
    assert (a == b) == (left == right)
    expected = next(
        (i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), min(len(left), len(right))
    )
    assert common_tokens(a, b) == expected


@pytest.mark.parametrize("wrong", [-1, 2**32, 1.0, "1", None])
def test_other_ids_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="token ids must be integers"):
        encode_tokens([1, wrong])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "kind", [tuple, bytes, bytearray, lambda x: np.array(x, dtype=np.int64), lambda x: np.array(x, "u1")]
)
def test_any_sequence_of_ints_encodes_alike(kind: type) -> None:
    assert encode_tokens(kind([1, 2, 3, 4])) == encode_tokens([1, 2, 3, 4])
