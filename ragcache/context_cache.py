"""The context cache: documents, retrieval, and answers from them, over one engine.

    with Engine.load("path/to/checkpoint") as engine, ContextCache(engine) as cache:
        cache.add([Document(title="The tower", text="...")])
        answer = cache.ask("What is the code of the tower?")
        print(answer.text, [source.document_id for source in answer.sources])

Invariant: an answer with retrieval is the answer to the same prompt with the same documents given by hand, unless it
was asked to blend. When `delete` or `update` returns, nothing that was computed from the document's earlier content is
left, nor will a request that was prepared before leave any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from stemcache.engine.blend import Blend
from stemcache.engine.engine import Engine
from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.outputs import Usage
from stemcache.engine.sampling import SamplingParams
from stemcache.engine.stream import Stream
from stemcache.engine.tentative import Tentative
from stemcache.ragcache.answer import Answer, sources
from stemcache.ragcache.blending import Blending
from stemcache.ragcache.catalogue import Catalogue
from stemcache.ragcache.compose import Context, Message, Template, compose
from stemcache.ragcache.document_store import DocumentStore
from stemcache.ragcache.documents import Change, Document, Record, Retrieved, updated
from stemcache.ragcache.embedders import Embedder, HashingEmbedder
from stemcache.ragcache.errors import CatalogueError
from stemcache.ragcache.index import KINDS, Kind
from stemcache.ragcache.library import Library
from stemcache.ragcache.preparation import Preparation, Prepared, Space, Wish
from stemcache.ragcache.reuse import DocumentReuse, Reuse
from stemcache.ragcache.speculation import Speculation, SpeculationStats, Submit
from stemcache.ragcache.splitter import Splitter
from stemcache.ragcache.warming import Warming

DEFAULT = Space()
PASSAGE_TOKENS = 512
GREEDY = SamplingParams(max_tokens=256, temperature=0)


class ContextCache:
    """Documents and answers over one engine. Methods may be called from any thread; many of them wait for the engine.

    Args:
        folder: where the documents are kept, made if it is missing; None keeps them in memory. One process at a time.
        embedder: texts to vectors; by default one that needs no download and finds words, not meanings.
        index: "flat" compares with all passages, "ivf" and "hnsw" with some. See docs/documents.md.
        passage_tokens: documents are split into passages of so many tokens at most; None leaves them whole.
        system_prompt: what stands before the documents, in `ask`, `warm` and `pin`.
        speculate: let the engine begin with the documents found so far, where searches take long enough. No answer
            changes.
        clock: seconds since 1970.

    Attributes:
        blending: what allows `reuse="blend"`, which is off until it is switched on there.

    Raises CatalogueError, EmbedderError, MissingExtraError, InvalidRequestError.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        folder: Path | str | None = None,
        embedder: Embedder | None = None,
        index: Kind = "flat",
        passage_tokens: int | None = PASSAGE_TOKENS,
        system_prompt: str = "",
        speculate: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if index not in KINDS:
            raise InvalidRequestError(f"index is one of {', '.join(KINDS)}, not {index!r}")
        self.engine = engine
        self.system_prompt = system_prompt
        splitter = Splitter(engine.prompts.backend, passage_tokens)
        place = None if folder is None else _made(Path(folder))
        embedder = embedder or HashingEmbedder()
        catalogue = Catalogue(None if place is None else place / "documents.sqlite", clock=clock)
        try:
            self._library = Library(catalogue, embedder, splitter, index, place)
            self._preparation = Preparation(engine, self._library)
            self._reuse = Reuse(engine.cache)
            self._documents = DocumentStore(engine.cache, self._library, clock=clock, removed=self._removed)
        except BaseException:
            catalogue.close()
            raise
        self._catalogue = catalogue
        self._speculates = speculate
        self._speculation = Speculation(engine, self._library, self.submitted)
        self._warming = Warming(self._preparation, self._documents)
        self.blending = Blending(engine, self._documents)

    # -- documents -----------------------------------------------------------------------------------------------------

    def add(
        self,
        documents: Iterable[Document | str],
        *,
        space: Space = DEFAULT,
        on_progress: Callable[[Change], None] | None = None,
    ) -> Sequence[Change]:
        """Add documents, or change those with the same ids. Each is complete before the next begins.

        on_progress: called after each. Raises DocumentError, EmbedderError, CatalogueError, and InvalidRequestError for
        one that was to be pinned and could not be; it is there then, but not pinned.
        """
        changes = []
        for document in documents:
            given = Document(text=document) if isinstance(document, str) else document
            change = self._put(space, given)
            changes.append(change)
            if on_progress is not None:
                on_progress(change)
        return changes

    def update(self, document_id: str, *, space: Space = DEFAULT, **changes: Any) -> Change:
        """Change some fields of a document, as they are named in `Document`. Raises DocumentError, and as `add`."""
        return self._put(space, updated(self.get(document_id, space=space).document, changes))

    def delete(self, document_id: str, *, space: Space = DEFAULT) -> int:
        """Delete a document and all that was computed from it; returns the number of chunks. Raises DocumentError."""
        self._warming.forget(document_id, space)  # the engine's pins end with the chunks
        return self._documents.delete(space.owner, document_id)

    def get(self, document_id: str, *, space: Space = DEFAULT) -> Record:
        """Raises DocumentNotFoundError."""
        self._documents.expire()
        return self._catalogue.get(space.owner, document_id)

    def list(self, *, after: str = "", limit: int = 100, space: Space = DEFAULT) -> Sequence[Record]:
        """Documents in the order of their ids, from the one after `after` on."""
        self._documents.expire()
        return self._catalogue.records(space.owner, after=after, limit=limit)

    def has(self, document_id: str, *, space: Space = DEFAULT) -> bool:
        """Whether there is such a document."""
        return self._catalogue.find(space.owner, document_id) is not None

    def knows_any(self, documents: Sequence[tuple[str, str]], *, space: Space = DEFAULT) -> bool:
        """Whether one of these (title, text) is a passage of the catalogue."""
        return any(self._catalogue.passage_like(space.owner, *each) is not None for each in documents)

    def count(self, *, space: Space = DEFAULT) -> int:
        """How many documents there are."""
        self._documents.expire()
        return self._catalogue.count(space.owner)

    def expire(self) -> None:
        """Delete the documents whose time is over. Every method that looks at documents does so too."""
        self._documents.expire()

    def warm(self, document_id: str, *, system_prompt: str | None = None, space: Space = DEFAULT) -> int:
        """Have the engine read a document right after the system prompt; returns how many of its tokens are cached.

        A document of several passages has each of them read there. Raises DocumentNotFoundError, ContextLengthError.
        """
        self._documents.expire()
        return self._warming.warm(document_id, self._messages("?", system_prompt), space)

    def pin(self, document_id: str, *, system_prompt: str | None = None, space: Space = DEFAULT) -> int:
        """Warm a document and keep it, whole chunks of it, from being evicted; returns the tokens of the pins.

        It is remembered as pinned; after a restart `warm_pinned` pins it again. Raises as `warm`, and
        InvalidRequestError when pins would hold more than their share of the pool; then it is not pinned.
        """
        changes = {"pinned": True, "system_prompt": system_prompt}
        document = updated(self.get(document_id, space=space).document, changes)
        self._documents.put(space.owner, document)
        return self._warming.keep(document, self._messages("?", system_prompt), space)

    def unpin(self, document_id: str, *, space: Space = DEFAULT) -> None:
        """End the pins of a document; it stays cached until room is needed. Raises DocumentNotFoundError."""
        self.update(document_id, space=space, pinned=False)

    def warm_pinned(self, *, space: Space = DEFAULT, should_stop: Callable[[], bool] = lambda: False) -> int:
        """Pin again the documents that are remembered as pinned, as far as there is room for pins; returns how many."""
        own = [document_id for owner, document_id in self._catalogue.pinned() if owner == space.owner]
        return sum(
            self._warming.keep_again(document_id, lambda prompt: self._messages("?", prompt), space)
            for document_id in own
            if not should_stop()
        )

    # -- questions -----------------------------------------------------------------------------------------------------

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
        """The prompt of a conversation, with documents for `question`. Submit `tokens` with `blend`, call `submitted`.

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

    def started(self, prepared: Prepared, usage: Usage) -> None:
        """To be called once a submitted prompt has been read: what `reuse` tells."""
        self._reuse.count(prepared, usage)

    def reuse(self, limit: int = 100, *, space: Space = DEFAULT) -> Sequence[DocumentReuse]:
        """What prompts found of each document in the cache, of those used last, and what is cached of them now."""
        found = self._reuse.of(space, limit)
        return [each for each in found if self.has(each.document_id, space=space)]  # others' time was over

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

        def submit(tokens: Sequence[int], tentative: Tentative) -> Stream:
            return self._submit(tokens, params, space, tentative)

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

    # -- life ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Save the index and close the catalogue; idempotent. The engine stays open."""
        try:
            self._library.save()
        except CatalogueError:
            return  # closed before
        self._catalogue.close()

    def __enter__(self) -> ContextCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _removed(self, owner: str, document_id: str, keys: Sequence[int]) -> None:
        """Prompts are remembered here and there, and these hold the text."""
        self._preparation.paths.forget(keys)
        self._reuse.forget(owner, document_id, is_deleted=self._library.catalogue.find(owner, document_id) is None)

    def _put(self, space: Space, document: Document) -> Change:
        change = self._documents.put(space.owner, document)
        if document.pinned and change.status != "unchanged":
            self._warming.keep(document, self._messages("?", document.system_prompt), space)
        elif change.status == "updated":
            self._warming.unpin(document.id, space)
        return change

    def _messages(self, question: str | None, system_prompt: str | None = None) -> Sequence[Message]:
        system = self.system_prompt if system_prompt is None else system_prompt
        first: Sequence[Message] = [{"role": "system", "content": system}] if system else []
        return first if question is None else [*first, {"role": "user", "content": question}]

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

    def _asked_for(self, prepared: Prepared) -> Prepared:
        self._preparation.paths.count(each.passage.key for each in prepared.retrieved)
        return prepared

    def _submit(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        space: Space,
        tentative: Tentative | None = None,
        blend: Blend | None = None,
    ) -> Stream:
        return self.engine.submit(
            tokens, params, tenant=space.tenant, cache_salt=space.cache_salt, tentative=tentative, blend=blend
        )

    def _answer(self, prepared: Prepared, params: SamplingParams) -> Answer:
        with prepared.stream or self._submit(prepared.tokens, params, prepared.space, blend=prepared.blend) as stream:
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


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CatalogueError(f"the folder of documents {folder} cannot be made: {error.strerror}") from error
    return folder
