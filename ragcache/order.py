"""The order of a context's documents that reuses most of what is cached.

Invariant: the result holds exactly the documents that were given, and none stands more than `max_shift` places from
where it stood. Retrieval put them in order of relevance, and models read the order.

Keys and values belong to a document after exactly those before it, so the same documents in another order are computed
anew. The order chosen here walks down the tree of what is cached, as long as one of the documents goes on from where
the walk is; the others follow by popularity, so that requests with some documents in common begin alike the next time:
each is the one that was asked for most often together with the one before it, or most often at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Document = TypeVar("Document")


def cache_order(
    documents: Sequence[Document],
    resident: Callable[[Sequence[Document]], int],
    popularity: Callable[[Document], float],
    *,
    together: Callable[[Document, Document], float] = lambda one, other: 0.0,
    max_shift: int | None = None,
    min_gain: int = 1,
) -> list[Document]:
    """Return `documents`, given by relevance, in the order that finds most of them cached. At most n*(n+1)/2 look-ups.

    Sorting by popularity alone did about as well in simulation, and by an arbitrary key (the id) worse than leaving
    the order alone in measurements of others (arXiv 2606.19667); docs/policies.md has our figures.

    Args:
        resident: called with some of the documents in some order; returns how many leading tokens of a prompt with
            exactly these documents are cached now. What stands before the documents may be counted or not.
        popularity: how often a document was asked for, in any unit. Decides between equals.
        together: how often two documents were. Without it only popularity decides what follows.
        max_shift: how many places a document may be moved at most; None for any, 0 keeps the order.
        min_gain: tokens that a document must add to what is cached, to count as cached itself. Take a chunk's worth:
            all documents share the first few tokens with some other, by their markup.

    Raises:
        ValueError: `max_shift` is negative or `min_gain` is not positive.
    """
    if max_shift is not None and max_shift < 0:
        raise ValueError(f"max_shift must not be negative, but is {max_shift}")
    if min_gain < 1:
        raise ValueError(f"min_gain must be at least 1, not {min_gain}")
    shift = len(documents) if max_shift is None else max_shift
    popular = [popularity(document) for document in documents]
    left = list(range(len(documents)))  # ranks
    ordered: list[Document] = []
    n_resident, walking = resident([]), True
    while left:
        candidates = _movable(left, len(ordered), shift)
        found = {rank: resident([*ordered, documents[rank]]) for rank in candidates} if walking else {}
        cached = [rank for rank, n_tokens in found.items() if n_tokens >= n_resident + min_gain]
        beside = {} if cached or not ordered else {rank: together(ordered[-1], documents[rank]) for rank in candidates}
        chosen = max(cached or candidates, key=lambda rank: (beside.get(rank, 0.0), popular[rank], -rank))
        walking = chosen in cached
        n_resident = found.get(chosen, n_resident)
        left.remove(chosen)
        ordered.append(documents[chosen])
    return ordered


def _movable(left: Sequence[int], place: int, shift: int) -> list[int]:
    """Return the ranks, of those `left` in ascending order, that may stand at `place`.

    Who is at the end of what it may be moved must come now. Else anyone may who is near enough: those before it move
    one place on, which they may, since the first has room left and each of the others stands at least as far behind
    its own rank's limit.
    """
    if left[0] + shift <= place:
        return [left[0]]
    return [rank for rank in left if rank <= place + shift]
