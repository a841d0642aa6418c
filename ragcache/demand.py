"""Demand: how often documents were asked for lately, alone and two of them together.

Invariants: a count is halved for every `half_life` documents that were asked for after it, and one that has faded below
a quarter is dropped, so memory is bounded by what was asked for in a few half-lives. Nobody's counts show in another's
figures, whoever `whose` is: the order of documents follows them, and answers tell that order.

What is worth keeping follows them, too: a document that many asked for is known, though it was never read after the
one that it stands after now. In simulation counts of larger sets than pairs hit no more documents (docs/policies.md).
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from typing import Final

from stemcache.prefixtree.expected import Expected

HALF_LIFE: Final = 4_000  # in simulation 2,000 and 4,000 did as well, 10,000 hit 0.3 to 1 % fewer documents
_PAIRED: Final = 16  # of more documents only the first are counted in pairs, of which there are 120 then
_Group = tuple[Hashable, tuple[int, ...]]  # whose, and one document or two in ascending order
_FADED: Final = 0.25
_LARGEST_WEIGHT: Final = 4.0  # so nothing is kept for more than two half-lives longer than it should


class Demand:
    """Counts of documents by their keys. From any thread."""

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self._lock = threading.Lock()
        self._growth = 2.0 ** (1.0 / half_life)
        self._weight = 1.0  # what a count of one is written as now
        self._counts: dict[_Group, float] = {}

    def count(self, whose: Hashable, keys: Iterable[int]) -> None:
        """These documents were asked for, together."""
        asked = list(dict.fromkeys(keys))
        with self._lock:
            for group in [(key,) for key in asked] + list(combinations(sorted(asked[:_PAIRED]), 2)):
                self._counts[whose, group] = self._counts.get((whose, group), 0.0) + self._weight
            self._weight *= self._growth ** len(asked)
            if self._weight > _LARGEST_WEIGHT:
                self._fade()

    def of(self, whose: Hashable, *keys: int) -> float:
        """How often a document was asked for lately, or two of them together."""
        with self._lock:
            return self._counts.get((whose, tuple(sorted(keys))), 0.0) / self._weight

    def expected(self, whose: Hashable, keys: Sequence[int], stops: Sequence[int]) -> Expected:
        """How often a prompt with these documents was to be expected to begin so.

        A prompt that begins with one document could have been made of any request for it, and one that begins with two
        of any for both. Nothing is said of three and more, which hardly ever come together.

        Args:
            keys: the documents in their order. stops: the number of the prompt's tokens up to the end of each.
        """
        uses = [self.of(whose, *keys[:n]) for n in (1, 2)]
        return Expected(dict(zip(stops, uses, strict=False)).items())  # two documents may end with the same token

    def forget(self, keys: Iterable[int]) -> None:
        """These documents are no more. O(counts)."""
        gone = set(keys)
        with self._lock:
            self._counts = {group: count for group, count in self._counts.items() if gone.isdisjoint(group[1])}

    def _fade(self) -> None:
        faded = ((group, count / self._weight) for group, count in self._counts.items())
        self._counts = {group: count for group, count in faded if count >= _FADED}
        self._weight = 1.0
