"""Explanations: for every token of a prompt, whether it would be found in the cache, and why or why not.

Invariant: the hits are those of `PrefixStore.match_tokens`, so what `acquire` would find if it were called now (where
the pool is so full that a diverging chunk cannot be copied, `acquire` finds less). The ranges cover the prompt without
gap or overlap. Only the prompt's own namespace is looked at, and those
that the caller names as the same owner's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby, islice
from typing import Final

from stemcache.prefixtree.corpus import PublicCorpus
from stemcache.prefixtree.ledger import Ledger
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.tokens import TOKEN_BYTES, common_tokens, decode_tokens
from stemcache.prefixtree.tree import Match, PrefixTree

# How many cached chunks are looked at for the prompt's tokens at other places: a million tokens in chunks of 64. Taking
# them took 24 ms of processor time, sliding a prompt of 100,000 tokens along them another 40.
MAX_SEARCHED: Final = 1 << 14

# How many tokens of the nearest cached path are told where a prompt leaves it: enough for a date or a name.
CONTINUATION_TOKENS: Final = 16


class Reason(StrEnum):
    """Why a token is a hit or a miss. Where several hold, the later in this list wins, but for the last two."""

    NEVER_SEEN = "never_seen"
    """Not cached after this prefix, as far as the store remembers, and not at another place either."""
    UNFINISHED_CHUNK = "unfinished_chunk"
    """At the prompt's end, less than a chunk: never cached on its own."""
    OTHER_POSITION = "other_position"
    """In a run of tokens that is cached as a chunk, but at another position or after another prefix."""
    OTHER_NAMESPACE = "other_namespace"
    """Cached after this very prefix, but in another namespace of the same owner."""
    EVICTED = "evicted"
    """Was cached after this very prefix, and went."""
    PENDING = "pending"
    """Another request is computing it now. A request with this prompt would wait for it and then find it."""
    PARTIAL_CHUNK = "partial_chunk"
    """A hit: the beginning of a cached chunk from which the prompt parts, or in which it ends. It is copied."""
    PUBLIC = "public"
    """A hit: in the public corpus, from which it is copied."""
    HIT = "hit"
    """A hit: a whole cached chunk, shared as it is."""
    LAST_TOKEN = "last_token"
    """Computed in any case, cached or not: what follows from it is what the request wants to know."""

    @property
    def is_hit(self) -> bool:
        return self in (Reason.HIT, Reason.PARTIAL_CHUNK, Reason.PUBLIC)


@dataclass(frozen=True, slots=True)
class TokenRange:
    """The tokens [start, stop) of a prompt, and what is true of all of them."""

    start: int
    stop: int
    reason: Reason

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a prompt leaves the nearest cached path, and the tokens with which that path goes on instead."""

    position: int
    cached: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `PrefixStore.explain` found.

    Attributes:
        ranges: in order; neighbours differ in their reason.
        divergence: None where the whole prompt is cached, or goes on where the cached path ends.
        searched_all: False if the namespace has more chunks than are searched for the prompt's tokens at other places;
            some may then be called never seen or unfinished that are cached elsewhere.
    """

    n_tokens: int
    chunk_tokens: int
    ranges: tuple[TokenRange, ...]
    divergence: Divergence | None
    searched_all: bool

    @property
    def hit_tokens(self) -> int:
        return sum(each.tokens for each in self.ranges if each.reason.is_hit)

    def tokens_of(self, reason: Reason) -> int:
        return sum(each.tokens for each in self.ranges if each.reason is reason)


def explain(
    ledger: Ledger,
    corpus: PublicCorpus,
    namespace: Namespace,
    prompt: bytes,
    n_last: int,
    others: Iterable[Namespace] = (),
) -> Explanation:
    """Explain an encoded prompt whose last `n_last` tokens are computed in any case. Changes nothing.

    O(tokens + MAX_SEARCHED).
    """
    tree, size = ledger.tree, ledger.tree.chunk_tokens
    n_tokens = len(prompt) // TOKEN_BYTES
    n_reusable = n_tokens - n_last
    reusable = prompt[: n_reusable * TOKEN_BYTES]
    match = tree.match(namespace, reusable)
    public = corpus.match(namespace, reusable)
    longest = public or match

    # Painted from the weakest reason to the strongest, so that the order of the lines is the order of precedence.
    reasons = [Reason.NEVER_SEEN] * n_tokens
    _paint(reasons, n_tokens - n_tokens % size, n_tokens, Reason.UNFINISHED_CHUNK)
    for start, stop in _runs_elsewhere(tree, namespace, prompt, longest.tokens):
        _paint(reasons, start, stop, Reason.OTHER_POSITION)
    for other in others:
        _paint(reasons, match.tokens, tree.match(other, reusable).tokens, Reason.OTHER_NAMESPACE)
    _paint(reasons, match.full_tokens, _evicted_until(ledger, match, prompt), Reason.EVICTED)
    _paint(reasons, match.full_tokens, _pending_until(ledger, match, reusable), Reason.PENDING)
    _paint(reasons, match.full_tokens, match.tokens, Reason.PARTIAL_CHUNK)
    if public is not None:
        _paint(reasons, match.full_tokens, public.tokens, Reason.PUBLIC)
    _paint(reasons, 0, match.full_tokens, Reason.HIT)
    _paint(reasons, n_reusable, n_tokens, Reason.LAST_TOKEN)
    return Explanation(
        n_tokens,
        size,
        tuple(_ranges(reasons)),
        _divergence(longest) if longest.tokens < n_reusable else None,
        searched_all=match.node.root.n_chunks <= MAX_SEARCHED,
    )


def _paint(reasons: list[Reason], start: int, stop: int, reason: Reason) -> None:
    if start < stop:
        reasons[start:stop] = [reason] * (stop - start)


def _ranges(reasons: Sequence[Reason]) -> Iterator[TokenRange]:
    start = 0
    for reason, group in groupby(reasons):
        stop = start + sum(1 for _ in group)
        yield TokenRange(start, stop, reason)
        start = stop


def _runs_elsewhere(tree: PrefixTree, namespace: Namespace, prompt: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of every run of tokens from `start` on that is cached as a chunk somewhere. Runs may overlap.

    A run may begin at any token, not at multiples of a chunk only: a text that moved seldom moved by whole chunks. One
    slice and one lookup per token; bytes remember their hash, so the set costs next to nothing.
    """
    size = tree.chunk_tokens
    n_bytes = size * TOKEN_BYTES
    if start * TOKEN_BYTES + n_bytes > len(prompt):  # too little is missing to hold a chunk
        return
    keys = {node.key for node in islice(tree.newest_first(namespace), MAX_SEARCHED)}
    for begin in range(start * TOKEN_BYTES, len(prompt) - n_bytes + 1, TOKEN_BYTES):
        if prompt[begin : begin + n_bytes] in keys:
            yield begin // TOKEN_BYTES, begin // TOKEN_BYTES + size


def _evicted_until(ledger: Ledger, match: Match, prompt: bytes) -> int:
    """Return where the run of evicted chunks after the cached ones ends."""
    return match.full_tokens + ledger.tree.chunk_tokens * ledger.count_evicted(match.node, prompt)


def _pending_until(ledger: Ledger, match: Match, prompt: bytes) -> int:
    """Return up to where the prompt will be cached once whoever claimed its next chunk is through; 0 if nobody did."""
    claim = ledger.claims.holder(match.node, prompt)
    if claim is None:
        return 0
    size = ledger.tree.chunk_tokens
    return min(common_tokens(prompt, claim.prompt), len(claim.prompt) // TOKEN_BYTES // size * size)


def _divergence(match: Match) -> Divergence | None:
    """Return how the nearest cached path goes on after `match`: of several paths, along the latest inserted chunks."""
    if match.partial is not None:
        node, cached = match.partial, match.partial.key[match.partial_tokens * TOKEN_BYTES :]
    else:
        node, cached = match.node, b""
    while len(cached) < CONTINUATION_TOKENS * TOKEN_BYTES and node.children:
        node = next(reversed(node.children.values()))
        cached += node.key
    if not cached:
        return None
    return Divergence(match.tokens, tuple(decode_tokens(cached[: CONTINUATION_TOKENS * TOKEN_BYTES])))
