"""Answers from documents, and what of the documents was reused.

Invariant: what is told of the documents' tokens is what the engine counted: a request's cached tokens are the leading
ones of its prompt, so each document's part of them follows from where it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stemcache.engine.blend import Moved
from stemcache.engine.outputs import FinishReason, Usage
from stemcache.prefixtree.explain import Explanation, Reason
from stemcache.ragcache.documents import Retrieved

Reuse = Literal["all", "part", "none", "moved"]

_WHY = {
    Reason.EVICTED: "it was cached at this place and was evicted or cleared",
    Reason.PENDING: "another request is computing it now",
    Reason.OTHER_POSITION: "it is cached after other text only, and keys and values depend on all before them",
    Reason.OTHER_NAMESPACE: "it is cached under another cache salt only",
    Reason.UNFINISHED_CHUNK: "it ends in a chunk that the prompt does not fill, and only whole chunks are cached",
    Reason.NEVER_SEEN: "it was not read before at this place",
}


@dataclass(frozen=True, slots=True)
class Source:
    """A passage that the model was given, and how much of it did not have to be computed.

    moved_tokens: those that were moved here from where the passage was read alone, which is not exact.
    why: in words, where something was computed.
    """

    retrieved: Retrieved
    tokens: int
    cached_tokens: int
    why: str | None
    moved_tokens: int = 0

    @property
    def computed_tokens(self) -> int:
        return self.tokens - self.cached_tokens - self.moved_tokens

    @property
    def reuse(self) -> Reuse:
        if self.moved_tokens:
            return "moved"
        if self.cached_tokens == self.tokens:
            return "all"
        return "part" if self.cached_tokens else "none"

    @property
    def document_id(self) -> str:
        return self.retrieved.passage.document_id

    @property
    def title(self) -> str:
        return self.retrieved.passage.title

    @property
    def text(self) -> str:
        return self.retrieved.passage.text


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, from which documents. `notes` say what the asker might not expect."""

    text: str
    finish_reason: FinishReason
    sources: tuple[Source, ...]
    notes: tuple[str, ...]
    usage: Usage


def sources(
    retrieved: Sequence[Retrieved],
    spans: Sequence[tuple[int, int]],
    cached_tokens: int,
    explanation: Explanation | None,
    moved: Sequence[Moved] = (),
) -> tuple[Source, ...]:
    """What was reused of each document. `explanation`: of the prompt before it was computed, for fuller reasons."""
    told = []
    for each, (start, stop) in zip(retrieved, spans, strict=True):
        cached = max(0, min(stop, cached_tokens) - start)
        n_moved = sum(len(part.kept) for part in moved if start <= part.start < stop)
        if n_moved:
            why: str | None = "it was read elsewhere and moved here; its beginning is computed again for each prompt"
        else:
            why = None if cached == stop - start else _why(start, stop, cached_tokens, explanation)
        told.append(Source(each, stop - start, cached, why, n_moved))
    return tuple(told)


def _why(start: int, stop: int, cached_tokens: int, explanation: Explanation | None) -> str:
    if explanation is None:
        if cached_tokens < start:
            return "something before it was computed, and keys and values depend on all before them"
        return "the cached part of the prompt ends here"
    missed = {
        each.reason: min(stop, each.stop) - max(start, each.start)
        for each in explanation.ranges
        if not each.reason.is_hit and each.start < stop and start < each.stop
    }
    if not missed:
        return "it was cached when the request came, and gone when the request began"
    return _WHY.get(max(missed, key=lambda reason: missed[reason]), "its last token is always computed")
