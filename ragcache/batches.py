"""Batches: many documents as requests of a size that servers take.

Invariant: every document is in one batch, in order; a batch has more than one document only within both limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_AT_ONCE = 32
_CHARACTERS_AT_ONCE = 1 << 20


def batches(documents: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    """Documents, each with a `text`, by the request. Few enough that progress shows and an answer comes soon."""
    batch: list[Mapping[str, Any]] = []
    size = 0
    for each in documents:
        if batch and (len(batch) == _AT_ONCE or size + len(each["text"]) > _CHARACTERS_AT_ONCE):
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += len(each["text"])
    if batch:
        yield batch
