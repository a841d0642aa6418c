"""Preparing a request: from a question to the prompt with its documents, and what is known of both.

Invariant: the documents in the prompt are those of `retrieved`, in that order; whatever else was found or asked for is
told in `notes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from stemcache.engine.blend import Blend
from stemcache.engine.cache import Cache
from stemcache.engine.engine import Engine
from stemcache.engine.errors import ContextLengthError, InvalidRequestError
from stemcache.engine.stream import Stream
from stemcache.prefixtree.expected import NOTHING, Expected
from stemcache.prefixtree.explain import Explanation
from stemcache.prefixtree.footprint import Footprint
from stemcache.ragcache.catalogue import Filter
from stemcache.ragcache.compose import Context, Message, Template, compose
from stemcache.ragcache.demand import Demand
from stemcache.ragcache.documents import Passage, Retrieved, content_hash
from stemcache.ragcache.errors import NoDocumentsError
from stemcache.ragcache.library import Library
from stemcache.ragcache.order import cache_order
from stemcache.ragcache.paths import Paths, space_of

Order = Literal["relevance", "cache"]
Reuse = Literal["prefix", "blend"]

MAX_K: Final = 100


@dataclass(frozen=True, slots=True)
class Space:
    """Whose documents and whose chunks: the owner in the catalogue, and what `Engine.submit` takes."""

    owner: str = ""
    tenant: bytes = b""
    cache_salt: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How to retrieve.

    k: passages at most. order: as retrieved, or so that most of them is cached.
    reuse: "prefix" is exact; "blend" also moves passages that were read at another place (`ContextCache.blending`).
    where: metadata that documents must have: a value, or a list of which they must have one.
    max_shift: how many places `order="cache"` may move a passage at most; None for any.
    explain: look up why something is not cached; costs a wait for the engine's running step.

    Raises InvalidRequestError.
    """

    k: int = 4
    order: Order = "relevance"
    reuse: Reuse = "prefix"
    where: Filter | None = None
    max_shift: int | None = None
    explain: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_K:
            raise InvalidRequestError(f"k must be from 1 to {MAX_K}, not {self.k}", param="rag.k")
        if self.order not in get_args(Order):
            raise InvalidRequestError(f"order is 'relevance' or 'cache', not {self.order!r}", param="rag.order")
        if self.reuse not in get_args(Reuse):
            raise InvalidRequestError(f"reuse is 'prefix' or 'blend', not {self.reuse!r}", param="rag.reuse")
        if self.max_shift is not None and self.max_shift < 0:
            raise InvalidRequestError("max_shift must be at least 0", param="rag.max_shift")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt that is ready to be submitted, with `blend` if it has one.

    epoch: the document store's when the preparation began.
    stream: of its answer, where it was submitted already; to be read or cancelled.
    expected: how often its documents were asked for lately, to be submitted with it.
    marks, alone_marks: of its passages, by their keys: in the prompt, and where they are read alone to be moved.
    """

    space: Space
    epoch: int
    context: Context
    retrieved: tuple[Retrieved, ...]
    notes: tuple[str, ...]
    marks: tuple[tuple[int, Footprint], ...]
    explanation: Explanation | None = None
    advice: str | None = None
    blend: Blend | None = None
    stream: Stream | None = None
    alone_marks: tuple[tuple[int, Footprint], ...] = ()
    expected: Expected = NOTHING

    @property
    def all_marks(self) -> tuple[tuple[int, Footprint], ...]:
        """Of the prompt, and of what is read alone for it."""
        return (*self.marks, *self.alone_marks)

    @property
    def tokens(self) -> list[int]:
        return self.context.tokens


@dataclass(slots=True)
class Preparation:
    """Retrieves, leaves out what does not fit, orders and composes. Of one engine and library."""

    engine: Engine
    library: Library
    paths: Paths = field(default_factory=Paths)
    demand: Demand = field(default_factory=Demand)

    def notes_on(self, space: Space, found: Sequence[Retrieved], wish: Wish) -> list[str]:
        """What to say of the passages that were found. Raises NoDocumentsError if there are none."""
        if not found and not self.library.catalogue.count(space.owner):
            raise NoDocumentsError("there are no documents to retrieve from: add some first")
        if not found:
            raise NoDocumentsError("no document has the metadata that the filter asks for: widen it, or leave it out")
        few = f"{wish.k} passages were asked for, and there are only {len(found)}"
        return [few] if len(found) < wish.k else []

    def identify(self, space: Space, documents: Sequence[tuple[str, str]]) -> list[Retrieved]:
        """Documents (title, text) that the caller brought. Those that are the owner's are told by their content."""
        return [
            Retrieved(self.library.catalogue.passage_like(space.owner, title, text) or _stranger(title, text))
            for title, text in documents
        ]

    def asked_for(self, prepared: Prepared) -> None:
        """Count the documents of a prompt that was asked for: once, however often it was composed."""
        self.demand.count(prepared.space, [each.passage.key for each in prepared.retrieved])

    def forget(self, keys: Sequence[int]) -> None:
        """Passages that are no more leave what is remembered of prompts. O(what is remembered), if there are any."""
        if keys:
            self.paths.forget(keys)
            self.demand.forget(keys)

    def compose(
        self,
        space: Space,
        epoch: int,
        messages: Sequence[Message],
        retrieved: Sequence[Retrieved],
        wish: Wish,
        *,
        template: Template | None = None,
        answer_tokens: int = 1,
        notes: Sequence[str] = (),
        may_leave_out: bool = True,
    ) -> Prepared:
        """The prompt of messages with these documents, as many of them as fit beside `answer_tokens`.

        Raises ContextLengthError if that is none, or not all and none may be left out.
        """
        told = list(notes)
        context, kept = self._fitting(messages, list(retrieved), template, answer_tokens, may_leave_out)
        if len(kept) < len(retrieved):
            left = ", ".join(f"'{each.passage.document_id}'" for each in retrieved[len(kept) :])
            told.append(f"{len(retrieved) - len(kept)} of {len(retrieved)} passages do not fit the context: {left}")
        if wish.order == "cache" and len(kept) > 1:
            ordered = self._ordered(space, context, kept, wish)
            if ordered != kept:
                context, kept = compose(self.engine.prompts, messages, _texts(ordered), template), ordered
        keys = [each.passage.key for each in kept]
        stops = [stop for _, stop in context.spans]
        self.paths.remember(space_of(space.tenant, space.cache_salt, context.head), context.tokens, keys, stops)
        explanation = self._explain(space, context) if wish.explain else None
        return Prepared(
            space,
            epoch,
            context,
            tuple(kept),
            tuple(told),
            tuple(self._marks(space, context, kept)),
            explanation,
            None if explanation is None else self._advice(context, explanation),
            expected=self.demand.expected(space, keys, stops),
        )

    def _fitting(
        self,
        messages: Sequence[Message],
        retrieved: list[Retrieved],
        template: Template | None,
        answer_tokens: int,
        may_leave_out: bool,
    ) -> tuple[Context, list[Retrieved]]:
        room = self.engine.max_model_len - max(1, answer_tokens)
        kept = retrieved
        while True:
            context = compose(self.engine.prompts, messages, _texts(kept), template)
            excess = len(context.tokens) - room
            if excess <= 0 or not kept:
                return context, kept
            sizes = [stop - start for start, stop in context.spans]
            if len(kept) == 1 or not may_leave_out:
                raise ContextLengthError(
                    f"the documents take {sum(sizes)} tokens and the prompt {len(context.tokens)}, but with "
                    f"{max(1, answer_tokens)} for the answer there is room for {room}: give shorter documents "
                    "or fewer, let the catalogue split them into passages, or ask for a shorter answer",
                    param="documents",
                )
            while excess > 0 and len(kept) > 1:  # the least relevant go first
                excess -= sizes[len(kept) - 1]
                kept = kept[:-1]

    def _ordered(self, space: Space, context: Context, kept: list[Retrieved], wish: Wish) -> list[Retrieved]:
        of = {each.passage.key: each for each in kept}
        cache: Cache = self.engine.cache
        resident = self.paths.resident(
            space_of(space.tenant, space.cache_salt, context.head),
            context.head,
            list(of),
            lambda prompts: cache.cached_of(prompts, tenant=space.tenant, cache_salt=space.cache_salt),
        )
        shortest = min(stop - start for start, stop in context.spans)
        ordered = cache_order(
            list(of),
            lambda keys: resident.get(tuple(keys), 0),
            lambda key: self.demand.of(space, key),
            together=lambda one, other: self.demand.of(space, one, other),
            max_shift=wish.max_shift,
            min_gain=max(1, min(self.engine.chunk_tokens, shortest // 2)),
        )
        return [of[key] for key in ordered]

    def _marks(self, space: Space, context: Context, kept: Sequence[Retrieved]) -> list[tuple[int, Footprint]]:
        return [
            (
                each.passage.key,
                self.engine.cache.footprint(
                    context.tokens, start, stop, tenant=space.tenant, cache_salt=space.cache_salt
                ),
            )
            for each, (start, stop) in zip(kept, context.spans, strict=True)
            if each.passage.key > 0
        ]

    def _explain(self, space: Space, context: Context) -> Explanation:
        return self.engine.explain(context.tokens, tenant=space.tenant, cache_salt=space.cache_salt)

    def _advice(self, context: Context, explanation: Explanation) -> str | None:
        """What to do where something before the documents keeps them from being reused, such as a date."""
        where = explanation.divergence
        if where is None or not context.spans or where.position >= len(context.head):
            return None
        tokens, at = context.tokens, where.position
        before = tokens[max(0, at - 8) : at]
        ours, theirs = (self.engine.decode([*before, *part]) for part in (tokens[at : at + 8], where.cached[:8]))
        return (
            f"The prompt leaves what is cached at token {at}, before the documents: '{ours}' against '{theirs}'. "
            "Nothing after that can be reused: put what changes, such as a date, after the documents."
        )


def _texts(retrieved: Sequence[Retrieved]) -> list[dict[str, str]]:
    return [each.passage.for_template for each in retrieved]


def _stranger(title: str, text: str) -> Passage:
    """A passage that is nobody's. Its key says which content it is, and is below zero, where the catalogue has none."""
    return Passage(-1 - int(content_hash(title, text)[:15], 16), "", 0, 0, title, text)
