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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from stemcache.engine.engine import Engine
from stemcache.engine.errors import InvalidRequestError
from stemcache.ragcache.catalogue import Catalogue
from stemcache.ragcache.documents import Change, Document, Record, updated
from stemcache.ragcache.embedders import Embedder, HashingEmbedder
from stemcache.ragcache.errors import CatalogueError
from stemcache.ragcache.index import KINDS, Kind
from stemcache.ragcache.library import Library
from stemcache.ragcache.preparation import Space
from stemcache.ragcache.questions import DEFAULT, Questions
from stemcache.ragcache.splitter import Splitter
from stemcache.ragcache.warming import Warming

PASSAGE_TOKENS = 512


class ContextCache(Questions):
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
        splitter = Splitter(engine.prompts.backend, passage_tokens)
        place = None if folder is None else _made(Path(folder))
        embedder = embedder or HashingEmbedder()
        catalogue = Catalogue(None if place is None else place / "documents.sqlite", clock=clock)
        try:
            library = Library(catalogue, embedder, splitter, index, place)
            super().__init__(engine, library, clock=clock, system_prompt=system_prompt, speculate=speculate)
        except BaseException:
            catalogue.close()
            raise
        self._catalogue = catalogue
        self._warming = Warming(self._preparation, self._documents)

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

    def _put(self, space: Space, document: Document) -> Change:
        change = self._documents.put(space.owner, document)
        if document.pinned and change.status != "unchanged":
            self._warming.keep(document, self._messages("?", document.system_prompt), space)
        elif change.status == "updated":
            self._warming.unpin(document.id, space)
        return change


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CatalogueError(f"the folder of documents {folder} cannot be made: {error.strerror}") from error
    return folder
