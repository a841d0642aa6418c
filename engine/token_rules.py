"""Token rules: which tokens a request forbids, by `min_tokens`, `allowed_token_ids` and `bad_words`.

Invariant: at every position at least one token is left; rules that could forbid all of them are refused beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.sampling import SamplingParams

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class TokenRules:
    """The rules of one request, in token ids.

    allowed: the only tokens that may come; None for all.
    early: tokens that may not come before `min_tokens` were generated: those that would end the sequence.
    phrases: token sequences that may not be completed; the last token of each is what is forbidden.
    """

    allowed: tuple[int, ...] | None
    early: tuple[int, ...]
    min_tokens: int
    phrases: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, params: SamplingParams, *, eos: frozenset[int], vocab_size: int, encode: Encode) -> TokenRules | None:
        """The rules that `params` ask for; None if there are none. Raises InvalidRequestError."""
        if not params.min_tokens and params.allowed_token_ids is None and not params.bad_words:
            return None
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else eos)
        early = tuple(sorted(ends)) if params.min_tokens else ()
        phrases = tuple(sorted({phrase for word in params.bad_words for phrase in _spellings(word, encode)}))
        allowed = None if params.allowed_token_ids is None else tuple(sorted(set(params.allowed_token_ids)))
        rules = cls(allowed, early, params.min_tokens, phrases)
        sometimes_forbidden = set(early) | {phrase[-1] for phrase in phrases}
        left = set(range(vocab_size) if rules.allowed is None else rules.allowed) - sometimes_forbidden
        if not left:
            param = "bad_words" if rules.allowed is None else "allowed_token_ids"
            raise InvalidRequestError(
                "bad_words, min_tokens and allowed_token_ids together leave no token to choose; relax one of them",
                param=param,
            )
        return rules

    def apply(self, scores: Tensor, generated: Sequence[int]) -> Tensor:
        """A copy of `scores` float32[vocabulary] in which what must not follow `generated` is -inf."""
        if self.allowed is None:
            scores = scores.clone()
        else:
            allowed = torch.tensor(self.allowed, device=scores.device)
            scores = torch.full_like(scores, float("-inf")).index_copy(0, allowed, scores[allowed])
        forbidden = [phrase[-1] for phrase in self.phrases if _ends_with(generated, phrase[:-1])]
        if len(generated) < self.min_tokens:
            forbidden += self.early
        scores[forbidden] = float("-inf")
        return scores


def _spellings(word: str, encode: Encode) -> list[tuple[int, ...]]:
    """The token sequences of a word, at the start of a text and after a space, as vLLM takes it."""
    return [tuple(ids) for ids in (encode(word), encode(" " + word)) if ids]


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return len(tokens) >= len(end) and list(tokens[len(tokens) - len(end) :]) == list(end)
