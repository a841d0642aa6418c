"""Shared by the store's tests: a namespace maker and a store over a memory that remembers what was written where."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.store import PrefixStore

CHUNK = 4


class CopyLog:
    """A `copy_tokens` that lists its calls and can be made to fail."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.error: Exception | None = None

    def __call__(self, source_slot: int, target_slot: int, n_tokens: int) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append((source_slot, target_slot, n_tokens))


@pytest.fixture
def namespace() -> Namespace:
    return Namespace.of(model="m", dtype="float32")


@pytest.fixture
def copies() -> CopyLog:
    return CopyLog()


@pytest.fixture
def make_store(copies: CopyLog) -> Callable[[int], PrefixStore]:
    """A store of `n` chunks of 4 tokens."""
    return lambda n_chunks: PrefixStore(n_chunks, CHUNK, copies)
