"""Sampling parameters: what a request asks of each generated token.

Invariant: an instance that exists is valid. Everything that can be judged without the model is judged in
`__post_init__`; token ids are judged against the vocabulary when the request is submitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.grammar import Grammar

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_BAD_WORDS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request.

    max_tokens: tokens to generate at most; None for as many as the model and the pool can hold, 0 to only read the
        prompt.
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_p, top_k, min_p: keep the smallest set of mass `top_p`, the `top_k` likeliest (0: all), those at least `min_p`
        times as likely as the likeliest (arXiv 2407.01082).
    repetition_penalty: divides positive and multiplies negative logits of every token seen in prompt or output
        (CTRL, arXiv 1909.05858).
    presence_penalty, frequency_penalty: subtracted once, and once per occurrence, for tokens of the output (OpenAI).
    logit_bias: added to the logits, by token id.
    seed: makes the request reproducible, whatever else runs beside it; choice i draws from `seed + i`.
    n: how many choices; they share the prompt's chunks.
    logprobs: number of alternatives to report with each token (0: only the chosen one), None for no log-probabilities.
        They are those of the raw logits, before temperature and penalties.
    stop: strings that end the text; they are not part of it. stop_token_ids: tokens that end it.
    ignore_eos: go on after the model's end-of-sequence token.
    min_tokens: before so many tokens nothing ends the text: tokens that would are not chosen, stop strings not minded.
    allowed_token_ids: the only tokens to choose from; None for all.
    bad_words: words that the output may not hold, with or without a space before them.
    prompt_logprobs: number of alternatives to report with each token of the prompt (0: only its own), None for no
        log-probabilities of the prompt. Then all of the prompt is computed, for they need its logits.
    skip_special_tokens: leave special tokens out of the text.
    include_stop_str_in_output: the text keeps the stop string, or the token, that ended it.
    grammar: what the text has to follow. It ends where the grammar is complete; before that neither the model nor a
        stop token can end it, only `max_tokens` and stop strings cut it. Once complete, `min_tokens` is not minded.

    Raises InvalidRequestError, naming the parameter.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 0, None)
        _require_number("temperature", self.temperature, 0.0, 100.0)
        _require_number("top_p", self.top_p, 0.0, 1.0, above=True)
        _require_int("top_k", self.top_k, 0, None)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token, bias in self.logit_bias.items():
            _require_int("logit_bias", token, 0, None)
            _require_number("logit_bias", bias, -100.0, 100.0)
        if self.seed is not None:
            _require_int("seed", self.seed, -(2**63), 2**63 - 1)
        _require_int("n", self.n, 1, MAX_CHOICES)
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _require_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InvalidRequestError(f"grammar must be a Grammar, got {self.grammar!r}", param="grammar")
        self._check_stops()
        self._check_rules()

    def _check_rules(self) -> None:
        _require_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids must name at least one token", param="allowed_token_ids")
        for token in self.allowed_token_ids or ():
            _require_int("allowed_token_ids", token, 0, None)
        if isinstance(self.bad_words, str) or not all(isinstance(word, str) and word for word in self.bad_words):
            raise InvalidRequestError("bad_words must be a list of non-empty strings", param="bad_words")
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise InvalidRequestError(
                f"bad_words takes at most {MAX_BAD_WORDS} words, got {len(self.bad_words)}", param="bad_words"
            )

    def _check_stops(self) -> None:
        if isinstance(self.stop, str):
            raise InvalidRequestError("stop must be a list of strings, not one string", param="stop")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", param="stop"
            )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError("stop must hold non-empty strings", param="stop")
        for token in self.stop_token_ids:
            _require_int("stop_token_ids", token, 0, None)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the argmax of the raw logits."""
        return self.temperature == 0 and not self.reshapes_logits and self.grammar is None

    @property
    def reshapes_logits(self) -> bool:
        """Whether bias or penalties change the logits before the temperature does."""
        return bool(
            self.logit_bias or self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )


def _require_int(name: str, value: object, low: int, high: int | None) -> None:
    limits = f"at least {low}" if high is None else f"between {low} and {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise InvalidRequestError(f"{name} must be an integer, {limits}; got {value!r}", param=name)


def _require_number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (above and value == low):  # type: ignore[operator]
        limits = f"above {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
        raise InvalidRequestError(f"{name} must be a finite number {limits}; got {value!r}", param=name)
