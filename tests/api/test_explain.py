"""The words of an explanation: what differs, and what to do. The tokens here are words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from stemcache.api.explain import WHY, advice, difference, report
from stemcache.prefixtree.explain import Divergence, Explanation, Reason, TokenRange
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.store import PrefixStore

NAMESPACE = Namespace.of(model="m", dtype="float32")
TEXT = "You are helpful. Today is {}. The harbor has three cranes, and the tower has none at all."


class Words:
    """A tokenizer: digits and punctuation are tokens of their own, as in most models."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def encode(self, text: str) -> list[int]:
        pieces: list[str] = []
        for char in text:
            if pieces and char.isalpha() and pieces[-1][-1].isalpha() | pieces[-1].isspace():
                pieces[-1] += char
            else:
                pieces.append(char)
        self.known += [piece for piece in dict.fromkeys(pieces) if piece not in self.known]
        return [self.known.index(piece) for piece in pieces]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.known[token] for token in tokens)


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def store() -> PrefixStore:
    return PrefixStore(64, 4, lambda source, target, n: None)


def asked(store: PrefixStore, words: Words, cached: str, prompt: str) -> dict[str, Any]:
    tokens = words.encode(cached)
    with store.acquire(tokens, NAMESPACE) as lease:
        lease.reserve(len(tokens))
        lease.commit(tokens)
    tokens = words.encode(prompt)
    return report(store.explain(tokens, NAMESPACE, 1), tokens, words.decode)


def test_a_changing_date_is_named(store: PrefixStore, words: Words) -> None:
    told = asked(store, words, TEXT.format("2026-11-20"), TEXT.format("2026-11-21"))
    token = told["divergence"]["token"]
    assert told["divergence"] == {
        "token": token,
        "before": "You are helpful. Today is ",
        "prompt": "2026-11-21",
        "cached": "2026-11-20",
    }
    assert told["advice"][0].startswith(
        f"The prompt differs at token {token}, '2026-11-21' against '2026-11-20': put what changes after what does not."
    )
    assert "tokens are cached, but at another position or after another prefix" in told["advice"][0]


def test_a_new_question_at_the_end_is_as_it_should_be(store: PrefixStore, words: Words) -> None:
    told = asked(store, words, TEXT.format("Monday") + " Where is it?", TEXT.format("Monday") + " When was that?")
    assert told["advice"][0].endswith("'When' against 'Where'. All before it is reused, as it should be.")


def test_the_whole_prompt_is_cached(store: PrefixStore, words: Words) -> None:
    told = asked(store, words, TEXT, TEXT[:60])
    assert told["divergence"] is None
    assert told["advice"] == ["The whole prompt is cached; only its last token is computed, as always."]


def test_nothing_is_cached(store: PrefixStore, words: Words) -> None:
    told = asked(store, words, "", TEXT)
    assert told["divergence"] is None
    assert "new. The first request computes them" in told["advice"][0]


def test_the_first_token_differs(store: PrefixStore, words: Words) -> None:
    told = asked(store, words, TEXT, "Hello! " + TEXT)
    assert told["divergence"]["token"] == 0
    assert told["advice"][0].startswith(
        "The prompt differs from everything cached at its first token, 'Hello!' against 'You': put what changes after"
    )


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (Reason.EVICTED, "8 tokens were cached here before and went"),
        (Reason.PENDING, "8 tokens are being computed by another request"),
        (Reason.OTHER_POSITION, "8 tokens are cached at another position"),
        (Reason.OTHER_NAMESPACE, "8 tokens are cached under another cache_salt of yours"),
        (Reason.NEVER_SEEN, "8 tokens are new."),
        (Reason.UNFINISHED_CHUNK, "8 tokens are left over at the end, less than a chunk of 64"),
    ],
)
def test_every_miss_has_its_advice(reason: Reason, said: str) -> None:
    ranges = (TokenRange(0, 64, Reason.HIT), TokenRange(64, 72, reason), TokenRange(72, 73, Reason.LAST_TOKEN))
    [sentence] = advice(Explanation(73, 64, ranges, None, True), None)
    assert sentence.startswith(said)


def test_an_eviction_is_not_blamed_on_the_prompt() -> None:
    """Beside the evicted chunk stands another, so there is a divergence; it is not why the prompt misses."""
    ranges = (TokenRange(0, 64, Reason.HIT), TokenRange(64, 65, Reason.EVICTED))
    explanation = Explanation(65, 64, ranges, Divergence(64, (1, 2)), True)
    [sentence] = advice(explanation, difference(explanation, [0] * 65, str))
    assert sentence.startswith("1 token was cached here before and went")


def test_without_a_tokenizer_tokens_are_named_by_their_ids() -> None:
    ranges = (TokenRange(0, 1, Reason.PARTIAL_CHUNK), TokenRange(1, 2, Reason.NEVER_SEEN))
    explanation = Explanation(2, 64, ranges, Divergence(1, (9, 4)), True)
    differs = difference(explanation, [5, 7], lambda tokens: "")
    assert differs is not None
    assert (differs.before, differs.prompt, differs.cached) == ("", "token 7", "token 9")


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ("a\nb", "a c", ("a\nb", "a c")),
        ("Call 5.", "Call 6.", ("5", "6")),
        ("Call", "Call me", ("Call", "Call me")),
        ("x" * 90, "x" * 80 + "y" * 10, ("x" * 42, "x" * 32 + "y" * 10)),
    ],
)
def test_words_in_awkward_places(ours: str, theirs: str, expected: tuple[str, str]) -> None:
    decode = {(0,): ours, (1,): theirs, (): ""}
    explanation = Explanation(1, 64, (TokenRange(0, 1, Reason.NEVER_SEEN),), Divergence(0, (1,)), True)
    differs = difference(explanation, [0], lambda tokens: decode[tuple(tokens)])
    assert differs is not None
    assert (differs.prompt, differs.cached) == expected


def test_every_reason_has_its_words() -> None:
    assert WHY.keys() == set(Reason)
