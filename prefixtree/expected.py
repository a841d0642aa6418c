"""What is known of a prompt's prefixes before the cache has seen them: how often each was asked for lately.

Invariant: the prefixes are given by their lengths, in ascending order; a length stands for all up to it that no shorter
one stands for.

Who composes prompts of documents knows more than the tree: that a document was asked for often, only never yet after
the one that it stands after now. A policy may take it into account; what is cached of the prompt is the same anyway.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class Expected:
    """Uses of the prefixes of one prompt.

    Args:
        prefixes: (length in tokens, uses), the shortest first. Beyond the longest nothing is expected.

    Raises:
        ValueError: the lengths do not ascend, or a number of uses is negative or none.
    """

    __slots__ = ("_stops", "_uses")

    def __init__(self, prefixes: Iterable[tuple[int, float]] = ()) -> None:
        pairs = list(prefixes)
        self._stops = [stop for stop, _ in pairs]
        self._uses = [uses for _, uses in pairs]
        if any(later <= earlier for earlier, later in zip(self._stops, self._stops[1:], strict=False)):
            raise ValueError(f"the lengths of prefixes must ascend, but are {self._stops}")
        if not all(0.0 <= uses < float("inf") for uses in self._uses):
            raise ValueError(f"expected uses must be finite and not negative, but are {self._uses}")

    def of(self, n_tokens: int) -> float:
        """Return how often the first `n_tokens` tokens were asked for."""
        at = bisect_left(self._stops, n_tokens)
        return self._uses[at] if at < len(self._uses) else 0.0


NOTHING = Expected()
