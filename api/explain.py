"""Explanations in plain words: what the numbers of `Engine.explain` mean, and what to do about it.

Invariant: the text of a cached path is the asking tenant's own; it is shown around one place only, the divergence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stemcache.prefixtree.explain import Explanation, Reason

Decode = Callable[[Sequence[int]], str]

WHY: Final = {
    Reason.HIT: "cached as whole chunks, shared as they are",
    Reason.PUBLIC: "cached in the server's public corpus, copied from it",
    Reason.PARTIAL_CHUNK: "cached as the beginning of a chunk, copied from it",
    Reason.PENDING: "another request is computing it now",
    Reason.EVICTED: "was cached here and has been evicted or cleared",
    Reason.OTHER_NAMESPACE: "cached, but under another cache_salt of yours, and salts share nothing",
    Reason.OTHER_POSITION: "cached at another position or after another prefix, where it cannot be reused",
    Reason.UNFINISHED_CHUNK: "less than a chunk at the end, which is never cached on its own",
    Reason.NEVER_SEEN: "not seen before",
    Reason.LAST_TOKEN: "always computed: the answer begins with what follows from it",
}

_CONTEXT_TOKENS = 24
_EXCERPT_TOKENS = 24
_EXCERPT_CHARS = 48
_LONGEST_WORD = 32


@dataclass(frozen=True, slots=True)
class Difference:
    """The divergence as text: what both have before it, and the words in which prompt and cached path differ."""

    token: int
    before: str
    prompt: str
    cached: str


def difference(explanation: Explanation, prompt: Sequence[int], decode: Decode) -> Difference | None:
    """The divergence in words; None if there is none. Without a tokenizer the words are token ids."""
    where = explanation.divergence
    if where is None:
        return None
    context = list(prompt[max(0, where.position - _CONTEXT_TOKENS) : where.position])
    after = list(prompt[where.position : where.position + len(where.cached)])
    ours, theirs = decode(context + after), decode(context + list(where.cached))
    if ours == theirs:  # no tokenizer, or tokens that look the same
        return Difference(where.position, decode(context), f"token {after[0]}", f"token {where.cached[0]}")
    before, words = _differing_words(ours, theirs)
    return Difference(where.position, before, *words)


def _differing_words(ours: str, theirs: str) -> tuple[str, tuple[str, str]]:
    """The text that both begin with, up to a word's start, and from there the words in which they differ."""
    pairs = zip(ours, theirs, strict=False)
    first = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    start = max(first - _LONGEST_WORD, max(ours[:first].rfind(space) for space in " \n\t") + 1)
    left, right = (_word(text[start:], first - start) for text in (ours, theirs))
    while left and right and left[-1] == right[-1] and not left[-1].isalnum():
        left, right = left[:-1], right[:-1]
    return ours[:start], (left, right)


def _word(text: str, at_least: int) -> str:
    """The beginning of `text` to the end of the word around or after the character `at_least`."""
    end = re.compile(r"\s*\S*").match(text, at_least)
    assert end is not None, "this expression matches anything"
    return text[: min(end.end(), at_least + _LONGEST_WORD)]


def advice(explanation: Explanation, differs: Difference | None) -> list[str]:
    """What to know and to do, in sentences, the most useful one first. Never empty."""
    return list(_advice(explanation, differs))


def _advice(explanation: Explanation, differs: Difference | None) -> Iterator[str]:
    count = explanation.tokens_of
    if explanation.hit_tokens + count(Reason.LAST_TOKEN) == explanation.n_tokens:
        yield "The whole prompt is cached; only its last token is computed, as always."
        return
    if differs is not None and _first_miss(explanation) not in (
        Reason.EVICTED,
        Reason.PENDING,
        Reason.OTHER_NAMESPACE,
    ):
        yield _divergence_advice(explanation, differs)
    elif moved := count(Reason.OTHER_POSITION):
        yield (
            f"{_tokens(moved)} cached at another position or after another prefix. Keys and values depend on all "
            "before them: keep system prompt and documents in the same order from request to request."
        )
    if elsewhere := count(Reason.OTHER_NAMESPACE):
        yield (
            f"{_tokens(elsewhere)} cached under another cache_salt of yours: requests share nothing unless their salts "
            "are the same."
        )
    if evicted := count(Reason.EVICTED):
        yield (
            f"{_tokens(evicted, 'was', 'were')} cached here before and went: give the server a larger --pool-bytes, or "
            "pin what has to stay (POST /v1/cache/pin)."
        )
    if pending := count(Reason.PENDING):
        yield f"{_tokens(pending)} being computed by another request: one with this prompt would wait, and reuse them."
    if (new := count(Reason.NEVER_SEEN)) and differs is None:
        yield (
            f"{_tokens(new)} new. The first request computes them, the next one finds them; POST /v1/cache/warm "
            "does it ahead of time."
        )
    if rest := count(Reason.UNFINISHED_CHUNK):
        size = explanation.chunk_tokens
        yield f"{_tokens(rest)} left over at the end, less than a chunk of {size}, and never cached alone."


def _divergence_advice(explanation: Explanation, differs: Difference) -> str:
    where = f"at token {differs.token}" if differs.token else "from everything cached at its first token"
    sentence = f"The prompt differs {where}, '{differs.prompt}' against '{differs.cached}'"
    if moved := explanation.tokens_of(Reason.OTHER_POSITION):
        return (
            f"{sentence}: put what changes after what does not. {_tokens(moved)} cached, but at another position or "
            "after another prefix, where they are of no use."
        )
    if 2 * differs.token < explanation.n_tokens:
        behind = explanation.n_tokens - differs.token
        return f"{sentence}: put what changes after what does not. {_tokens(behind)} behind this place."
    return f"{sentence}. All before it is reused, as it should be."


def _first_miss(explanation: Explanation) -> Reason | None:
    """Why the first token that is no hit is none."""
    return next((each.reason for each in explanation.ranges if not each.reason.is_hit), None)


def _tokens(n: int, one: str = "is", many: str = "are") -> str:
    return f"1 token {one}" if n == 1 else f"{n} tokens {many}"


def report(explanation: Explanation, prompt: Sequence[int], decode: Decode) -> dict[str, Any]:
    """The answer of POST /v1/cache/explain."""
    differs = difference(explanation, prompt, decode)
    return {
        "object": "cache.explanation",
        "prompt_tokens": explanation.n_tokens,
        "cached_tokens": explanation.hit_tokens,
        "chunk_tokens": explanation.chunk_tokens,
        "ranges": [
            {
                "start": each.start,
                "stop": each.stop,
                "tokens": each.tokens,
                "result": "hit" if each.reason.is_hit else "miss",
                "reason": each.reason.value,
                "why": WHY[each.reason],
                "text": _excerpt(decode(prompt[each.start : min(each.stop, each.start + _EXCERPT_TOKENS)])),
            }
            for each in explanation.ranges
        ],
        "divergence": None
        if differs is None
        else {"token": differs.token, "before": differs.before, "prompt": differs.prompt, "cached": differs.cached},
        "advice": advice(explanation, differs),
        "searched_all": explanation.searched_all,
    }


def _excerpt(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= _EXCERPT_CHARS else text[: _EXCERPT_CHARS - 1] + "…"
