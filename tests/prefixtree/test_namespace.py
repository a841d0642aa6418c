"""Namespaces: equal only if every field is."""

from __future__ import annotations

from hashlib import sha256
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.prefixtree.namespace import Field, Namespace


def of(**fields: Field) -> Namespace:
    return Namespace.of(**{"model": "m", "dtype": "float32", **fields})


def test_the_digest_is_fixed_by_the_schema() -> None:
    """Cold tiers are read by other processes and later versions: this may change only together with the schema tag."""
    fields = [(b"dtype", b"str", b"float32"), (b"model", b"str", b"m"), (b"tenant", b"bytes", b"")]
    encoded = b"".join(len(part).to_bytes(8, "big") + part for field in fields for part in field)
    assert of().digest == sha256(b"stemcache.namespace.v1" + encoded).digest()


def test_the_order_of_fields_does_not_matter() -> None:
    assert of(layout="a", rope="b") == of(rope="b", layout="a")


COLLIDING_IF_CONCATENATED = [
    of(layout="ab", rope="c"),
    of(layout="a", rope="bc"),  # the boundary moved
    of(layout="c", rope="ab"),  # the values swapped
    of(adapter="ab", rope="c"),  # the tag swapped (vLLM issue 44701: adapter "X" was salt "X")
    of(layout="abropec"),  # the tag inside a value
    of(layout="ab", rope=b"c"),  # the type
    of(layout="ab", rope="c", codec=""),  # absent is not empty
    of(layout="ab", rope="c", tenant="x"),
    of(layout="ab", rope="c", codec="1"),
    of(layout="ab", rope="c", codec=1),
    of(layout="ab", rope="c", codec=-1),
]


@pytest.mark.parametrize(("left", "right"), list(combinations(COLLIDING_IF_CONCATENATED, 2)))
def test_different_fields_give_different_digests(left: Namespace, right: Namespace) -> None:
    assert left != right


fields = st.dictionaries(
    st.sampled_from(["a", "b", "ab", "ba"]), st.one_of(st.text("ab", max_size=2), st.integers(0, 2)), max_size=3
)


@settings(max_examples=200)
@given(fields, fields)
def test_equal_exactly_if_the_fields_are(left: dict[str, Field], right: dict[str, Field]) -> None:
    assert (of(**left) == of(**right)) == (left == right)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="'rope' must be str, bytes or int, not float"):
        of(rope=1.5)  # type: ignore[arg-type]


def test_a_digest_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 3"):
        Namespace(b"abc")
