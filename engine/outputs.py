"""What a request gives back: deltas while it runs, completions at the end. Plain values without behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stemcache.engine.blend import Moved

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token, and the likeliest tokens (id, log-probability) in falling order.

    `rank`, of a prompt's tokens only: 1 for the likeliest of the vocabulary.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step adds to choice `index`. Each choice ends with exactly one delta that has a finish reason.

    `text` may lag behind `token_ids`: unfinished characters and possible stop strings are held back.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. `cached_tokens` of the prompt were not computed but found in the store.

    `cache_write_tokens` of the prompt were computed and are in the store now, in chunks that this request was the first
    to publish. Cached and written ones together are at most the prompt. `evicted_tokens`, those that follow the cached
    ones, were computed again: they had been cached after this very prefix, and were evicted. `moved` are parts of the
    prompt that were moved to their places (see stemcache.engine.blend): with any, the answer is not exactly the
    model's.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_write_tokens: int = 0
    evicted_tokens: int = 0
    moved: tuple[Moved, ...] = ()

    @property
    def moved_tokens(self) -> int:
        """Tokens of the prompt that were moved and not computed."""
        return sum(len(each.kept) for each in self.moved)


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished choice of one prompt of `Engine.generate`. `usage` is that of the whole request, all its choices."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    index: int
    prompt_index: int
    logprobs: tuple[TokenLogprob, ...]
    usage: Usage
