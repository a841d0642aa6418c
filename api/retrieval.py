"""Chat completions with documents: retrieval on the server, and what was reused, for the answer.

Invariant: a prompt with documents that the catalogue knows is submitted only after their footprints were noted, and
checked against changes once it was; whether the server retrieved them or the caller brought them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stemcache.api.document_routes import space_of
from stemcache.api.encoding import chat_prompt, template_fields
from stemcache.api.errors import NoDocumentServiceError
from stemcache.api.generation import Prompt
from stemcache.engine.errors import InvalidRequestError

if TYPE_CHECKING:
    from stemcache.api.document_schemas import RagOptions
    from stemcache.api.encoding import Tools
    from stemcache.api.schemas import ChatRequest
    from stemcache.engine.engine import Engine
    from stemcache.engine.outputs import Usage
    from stemcache.ragcache.context_cache import ContextCache
    from stemcache.ragcache.preparation import Prepared, Space, Wish
    from stemcache.ragcache.speculation import Submit

Json = dict[str, Any]

# What is kept free of documents for an answer whose length the request leaves open.
_ANSWER_TOKENS = 256


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat's prompt. `prepared` if it has documents that the catalogue knows, or the request has `rag`."""

    prompt: Prompt
    prepared: Prepared | None = None


class Retrieval:
    """Makes the prompts of chats."""

    def __init__(self, engine: Engine, documents: ContextCache | None) -> None:
        self._engine = engine
        self._documents = documents
        self._tasks: set[asyncio.Task[None]] = set()

    async def prompt(
        self, body: ChatRequest, tools: Tools, answer_tokens: int | None, submit: Submit | None = None
    ) -> ChatPrompt:
        """The prompt of a chat completion. Raises InvalidRequestError, EmbedderError, CatalogueError.

        submit: how to submit it, or what may become it, as soon as it is known; then the prompt may have a stream.
        """
        prepared = None
        if body.rag is not None or (body.documents and self._documents is not None):
            room = answer_tokens or min(_ANSWER_TOKENS, self._engine.max_model_len // 4)
            prepared = await self._prepared(body, tools, room, submit)
        if prepared is None:
            return ChatPrompt(await chat_prompt(self._engine, body, tools))
        prompt = Prompt(
            prepared.tokens,
            submitted=lambda: self._submitted(prepared),
            started=lambda usage: self._started(prepared, usage),
            blend=prepared.blend,
            stream=prepared.stream,
            expected=prepared.expected,
        )
        return ChatPrompt(prompt, prepared)

    async def _prepared(
        self, body: ChatRequest, tools: Tools, answer_tokens: int, submit: Submit | None
    ) -> Prepared | None:
        if self._documents is None:
            raise NoDocumentServiceError
        space = space_of(body.cache_salt)
        return await asyncio.to_thread(_prepare, self._documents, body, tools, answer_tokens, space, submit)

    def _started(self, prepared: Prepared, usage: Usage) -> None:
        assert self._documents is not None
        self._documents.started(prepared, usage)

    def _submitted(self, prepared: Prepared) -> None:
        """In the background where there is something to do, as that waits for the engine."""
        documents = self._documents
        assert documents is not None
        if documents.is_current(prepared):
            return
        task = asyncio.create_task(asyncio.to_thread(documents.submitted, prepared))
        self._tasks.add(task)  # the event loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)


def _prepare(
    documents: ContextCache, body: ChatRequest, tools: Tools, answer_tokens: int, space: Space, submit: Submit | None
) -> Prepared | None:
    """None where the request has no `rag`, and documents that are nobody's."""
    messages = [message.for_template() for message in body.messages]
    template = template_fields(body, tools)
    given = [(document.title, document.text) for document in body.documents or ()]
    wish = _wish(body.rag)
    if given and body.rag is None and not documents.knows_any(given, space=space):
        return None
    if body.truncate_prompt_tokens is not None:
        raise InvalidRequestError(
            "'truncate_prompt_tokens' would cut documents in pieces that are no documents: leave it out, or lower "
            "'rag.k'.",
            param="truncate_prompt_tokens",
        )
    if given:
        named = () if body.rag is None else sorted(body.rag.model_fields_set & {"k", "query", "filter"})
        for name in named:
            raise InvalidRequestError(
                f"'rag.{name}' is for retrieval, and 'documents' are given: leave one of them out.", param=f"rag.{name}"
            )
        return documents.prepare_given(
            messages, given, wish, space=space, template=template, answer_tokens=answer_tokens
        )
    assert body.rag is not None
    question = body.rag.query or _question(body)
    return documents.prepare(
        messages, question, wish, space=space, template=template, answer_tokens=answer_tokens, submit=submit
    )


def _wish(options: RagOptions | None) -> Wish:
    from stemcache.ragcache.preparation import Wish

    if options is None:
        return Wish()
    wish = Wish(k=options.k, order=options.order, max_shift=options.max_shift, where=options.filter)
    return replace(wish, reuse=options.reuse, explain=options.explain)  # type: ignore[arg-type]  # Wish judges it


def _question(body: ChatRequest) -> str:
    for message in reversed(body.messages):
        if message.role == "user":
            return "\n".join(part.text for part in message.content)
    raise InvalidRequestError(
        "'rag' looks for the last user message, and there is none: give it one in .rag.query.", param="rag"
    )


def report(prepared: Prepared, usage: Usage) -> Json:
    """`rag` of the answer: which documents were used, and how much of each was not computed again."""
    from stemcache.ragcache.answer import sources

    spans = prepared.context.spans
    used = sources(prepared.retrieved, spans, usage.cached_tokens, prepared.explanation, usage.moved)
    documents = []
    for each in used:
        passage = each.retrieved.passage
        known = passage.key > 0
        documents.append(
            {
                "id": passage.document_id if known else None,
                "passage": passage.position if known else None,
                "version": passage.version if known else None,
                "title": passage.title,
                "score": each.retrieved.score,
                "tokens": each.tokens,
                "cached_tokens": each.cached_tokens,
                "moved_tokens": each.moved_tokens,
                "computed_tokens": each.computed_tokens,
                "reuse": each.reuse,
                "why": each.why,
            }
        )
    return {"documents": documents, "notes": [*prepared.notes, *([prepared.advice] if prepared.advice else [])]}
