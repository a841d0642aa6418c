"""Position-independent reuse: a passage that was read alone is moved to where it stands in a prompt.

    prompt    head | passage 1 | gap | passage 2 | gap | passage 3 | question
    alone     head | passage 2, padded to whole chunks         at the passage's old positions, in the ordinary cache

Invariant: what was read alone is exact and lies in the ordinary cache as the path "head, passage"; so the passage that
follows the head needs no move. What was moved is not exact, nor is what is computed after it: both lie in slots that
only their own sequence sees, and go with it.

Of each moved passage the first tokens are computed again, a share of them, with full attention to all before them, and
everything that is no passage is always computed. That choice is EPIC's (arXiv 2410.15332): computed without the
passages before it, a passage's beginning is what differs most, as attention piles up on first tokens. CacheBlend
(arXiv 2405.16444) chooses the tokens whose values deviate most on an early layer, which needs that layer for all of
them first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from stemcache.engine.errors import InvalidRequestError

SHARE: Final = 0.15
"""What is computed again unless told otherwise: CacheBlend's share, at which it lost at most 0.02 in F1 or Rouge-L."""

PADDING: Final = 0
"""The token that fills the last chunk of a passage read alone. Any would do: nothing before it depends on it."""


@dataclass(frozen=True, slots=True)
class Blend:
    """Which tokens of a prompt may be moved there.

    head: how many tokens stand before the first passage.
    passages: [start, stop) of each, one after the other, from `head` on.
    share: of a passage's tokens, how many are computed again, from 0 to 1.

    Raises InvalidRequestError.
    """

    head: int
    passages: tuple[tuple[int, int], ...]
    share: float = SHARE

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InvalidRequestError(f"the share to compute again is from 0 to 1, not {self.share}", param="blend")
        end = self.head
        for start, stop in self.passages:
            if not 0 <= end <= start < stop:
                raise InvalidRequestError(
                    f"passages follow one another after the head of {self.head} tokens; got {self.passages}",
                    param="blend",
                )
            end = stop

    def alone(self, prompt: Sequence[int], passage: tuple[int, int], chunk_tokens: int) -> list[int]:
        """The tokens to be read so that a passage can be moved from there: whole chunks, as only these are cached."""
        tokens = [*prompt[: self.head], *prompt[passage[0] : passage[1]]]
        return tokens + [PADDING] * (-len(tokens) % chunk_tokens)

    def computed_again(self, passage: tuple[int, int]) -> int:
        """How many tokens at the beginning of a passage are computed again."""
        return math.ceil(self.share * (passage[1] - passage[0]))


@dataclass(frozen=True, slots=True)
class Moved:
    """Tokens [start, stop) of a prompt: the first `recomputed` were computed again, the others moved there."""

    start: int
    stop: int
    recomputed: int

    @property
    def kept(self) -> range:
        """The positions that were moved and not computed."""
        return range(self.start + self.recomputed, self.stop)
