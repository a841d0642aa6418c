"""Questions to the documents of a library: what is retrieved, the prompts that it is put into, and the answers.

Invariant: whoever prepares a prompt notes its footprints, and looks once it was submitted whether a document was
deleted meanwhile (`document_store`); so no prompt outlives what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stemcache.engine.engine import Engine
from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.outputs import Usage
from stemcache.engine.sampling import SamplingParams
from stemcache.engine.stream import Stream
from stemcache.engine.tentative import Tentative
from stemcache.ragcache.answer import Answer, sources
from stemcache.ragcache.blending import Blending
from stemcache.ragcache.compose import Context, Message, Template, compose
from stemcache.ragcache.document_store import DocumentStore
from stemcache.ragcache.documents import Document, Retrieved
from stemcache.ragcache.library import Library
from stemcache.ragcache.preparation import Preparation, Prepared, Space, Wish
from stemcache.ragcache.reuse import DocumentReuse, Reuse
from stemcache.ragcache.speculation import Speculation, SpeculationStats, Submit

DEFAULT = Space()
GREEDY = SamplingParams(max_tokens=256, temperature=0)


class Questions:
    """The half of `ContextCache` that reads. From any thread; most methods wait for the engine.

    Attributes:
        system_prompt: what stands before the documents.
        blending: what allows `reuse="blend"`, which is off until it is switched on there.
    """

    def __init__(
        self, engine: Engine, library: Library, *, clock: Callable[[], float], system_prompt: str, speculate: bool
    ) -> None:
        self.engine = engine
        self.system_prompt = system_prompt
        self._library = library
        self._preparation = Preparation(engine, library)
        self._reuse = Reuse(engine.cache)
        self._documents = DocumentStore(engine.cache, library, clock=clock, removed=self._removed)
        self._speculates = speculate
        self._speculation = Speculation(engine, library, self.submitted)
        self.blending = Blending(engine, self._documents)

    def retrieve(self, question: str, wish: Wish | None = None, *, space: Space = DEFAULT) -> Sequence[Retrieved]:
        """The passages nearest to a question, the best first. Raises NoDocumentsError, EmbedderError."""
        self._documents.expire()
        wish = wish or Wish()
        found = self._library.search(space.owner, question, wish.k, wish.where)
        self._preparation.notes_on(space, found, wish)
        return found

    def retrieve_stages(
        self, question: str, wish: Wish | None = None, *, space: Space = DEFAULT
    ) -> Iterator[Sequence[Retrieved]]:
        """What is known after each part of the search; the last is what `retrieve` gives, empty if nothing is found."""
        wish = wish or Wish()
        self._documents.expire()
        return self._library.stages(space.owner, question, wish.k, wish.where)

    def compose(self, documents: Sequence[Document], question: str) -> Context:
        """The prompt of system prompt, documents and question. Looks neither at the catalogue nor at the cache."""
        texts = [{"title": document.title, "text": document.text} for document in documents]
        return compose(self.engine.prompts, self._messages(question), texts)

    def prepare(
        self,
        messages: Sequence[Message],
        question: str,
        wish: Wish | None = None,
        *,
        space: Space = DEFAULT,
        template: Template | None = None,
        answer_tokens: int = 1,
        submit: Submit | None = None,
    ) -> Prepared:
        """The prompt of a conversation, with documents for `question`. Submit it, call `submitted`.

        submit: how to submit prompts with the documents found so far, as long as the search goes on. The result has a
            `stream` then, if one of them was right. Not used with `explain`, which is about what comes before.
        Raises NoDocumentsError, ContextLengthError, EmbedderError.
        """
        wish = self._allowed(wish)
        self._documents.expire()
        epoch = self._documents.epoch

        def composed(found: Sequence[Retrieved]) -> Prepared:
            notes = self._preparation.notes_on(space, found, wish)
            prepared = self._preparation.compose(
                space, epoch, messages, found, wish, template=template, answer_tokens=answer_tokens, notes=notes
            )
            return self._noted(prepared, wish)

        # What is moved to its place costs so little that nothing is saved by beginning early.
        if submit is None or wish.explain or wish.reuse == "blend" or not self._speculates:
            return self._asked_for(composed(self._library.search(space.owner, question, wish.k, wish.where)))
        return self._asked_for(self._speculation.prepare(space, question, wish, composed, submit))

    def prepare_given(
        self,
        messages: Sequence[Message],
        documents: Sequence[tuple[str, str]],
        wish: Wish | None = None,
        *,
        space: Space = DEFAULT,
        template: Template | None = None,
        answer_tokens: int = 1,
    ) -> Prepared:
        """`prepare` with documents (title, text) that the caller brought. None of them is left out."""
        wish = self._allowed(wish)
        self._documents.expire()
        epoch = self._documents.epoch
        given = self._preparation.identify(space, documents)
        prepared = self._preparation.compose(
            space, epoch, messages, given, wish, template=template, answer_tokens=answer_tokens, may_leave_out=False
        )
        return self._asked_for(self._noted(prepared, wish))

    def is_current(self, prepared: Prepared) -> bool:
        """Whether no document was changed since; then `submitted` has nothing to do. Does not wait."""
        return prepared.epoch == self._documents.epoch

    def submitted(self, prepared: Prepared) -> None:
        """To be called once a prepared prompt was submitted: a document may have been deleted in between."""
        self._documents.verify(prepared.epoch, prepared.space.owner, prepared.all_marks)
        self._preparation.forget(list(self._gone(prepared)))

    def started(self, prepared: Prepared, usage: Usage) -> None:
        """To be called once a submitted prompt has been read, for `reuse`. One with deleted content is not counted."""
        if not self._gone(prepared):
            self._reuse.count(prepared, usage)

    def reuse(self, limit: int = 100, *, space: Space = DEFAULT) -> Sequence[DocumentReuse]:
        """What prompts found of each document in the cache, of those used last, and what is cached of them now."""
        found = self._reuse.of(space, limit)
        # the time of others was over
        return [each for each in found if self._library.catalogue.find(space.owner, each.document_id)]

    def ask(
        self,
        question: str,
        k: int = 4,
        *,
        params: SamplingParams = GREEDY,
        space: Space = DEFAULT,
        **wish: Any,
    ) -> Answer:
        """Answer a question from the `k` passages nearest to it. `wish` as of `Wish`: order, where, explain, ...

        Raises NoDocumentsError, ContextLengthError, EmbedderError, InvalidRequestError.
        """
        if params.n != 1:
            raise InvalidRequestError("ask gives one answer: leave 'n' out", param="n")

        def submit(prepared: Prepared, tentative: Tentative) -> Stream:
            return self._submit(prepared, params, tentative)

        prepared = self.prepare(
            self._messages(question),
            question,
            Wish(k=k, **wish),
            space=space,
            answer_tokens=params.max_tokens or 1,
            submit=submit,
        )
        return self._answer(prepared, params)

    def speculation(self) -> SpeculationStats:
        """What came of the prompts that were submitted before their search had ended."""
        return self._speculation.stats()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _messages(self, question: str, system_prompt: str | None = None) -> Sequence[Message]:
        system = self.system_prompt if system_prompt is None else system_prompt
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": question}]

    def _allowed(self, wish: Wish | None) -> Wish:
        wish = wish or Wish()
        if wish.reuse == "blend":
            self.blending.require_on()
        return wish

    def _noted(self, prepared: Prepared, wish: Wish) -> Prepared:
        if wish.reuse == "blend":
            prepared = self.blending.planned(prepared)
        self._documents.note(prepared.space.owner, prepared.all_marks)
        if prepared.blend is not None:
            self.blending.read(prepared)
        return prepared

    def _gone(self, prepared: Prepared) -> set[int]:
        """The keys of its passages that are no more."""
        if self.is_current(prepared):
            return set()
        owner, keys = prepared.space.owner, [key for key, _ in prepared.marks]
        return set(keys) - {each.key for each in self._library.catalogue.passages(owner, keys)}

    def _removed(self, owner: str, document_id: str, keys: Sequence[int]) -> None:
        """Prompts are remembered here and there, and these hold the text."""
        self._preparation.forget(keys)
        self._reuse.forget(owner, document_id, is_deleted=self._library.catalogue.find(owner, document_id) is None)

    def _asked_for(self, prepared: Prepared) -> Prepared:
        self._preparation.asked_for(prepared)
        return prepared

    def _submit(self, prepared: Prepared, params: SamplingParams, tentative: Tentative | None = None) -> Stream:
        return self.engine.submit(
            prepared.tokens,
            params,
            tenant=prepared.space.tenant,
            cache_salt=prepared.space.cache_salt,
            tentative=tentative,
            blend=prepared.blend,
            expected=prepared.expected,
        )

    def _answer(self, prepared: Prepared, params: SamplingParams) -> Answer:
        with prepared.stream or self._submit(prepared, params) as stream:
            self.submitted(prepared)
            deltas = list(stream)
        self.started(prepared, stream.usage)
        reason = deltas[-1].finish_reason
        assert reason is not None
        usage = stream.usage
        spans = prepared.context.spans
        used = sources(prepared.retrieved, spans, usage.cached_tokens, prepared.explanation, usage.moved)
        notes = (*prepared.notes, prepared.advice) if prepared.advice else prepared.notes
        return Answer("".join(delta.text for delta in deltas), reason, used, notes, usage)
