"""Warming: documents that are read before anybody asks, and kept.

Invariant: a document's pins are those of its present content; they end when it is unpinned, changed or deleted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence

from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.sampling import SamplingParams
from stemcache.ragcache.compose import Message
from stemcache.ragcache.document_store import DocumentStore
from stemcache.ragcache.documents import Document, Retrieved, updated
from stemcache.ragcache.preparation import Preparation, Prepared, Space, Wish

log = logging.getLogger(__name__)


class Warming:
    """Reads documents right after the system prompt. From any thread. `messages` end with any question."""

    def __init__(self, preparation: Preparation, documents: DocumentStore) -> None:
        self._preparation = preparation
        self._engine = preparation.engine
        self._documents = documents
        self._lock = threading.Lock()
        self._pins: dict[tuple[str, str], list[tuple[str, Space]]] = {}  # by owner and document

    def warm(self, document_id: str, messages: Sequence[Message], space: Space) -> int:
        """Returns how many of the document's tokens are cached. Raises DocumentNotFoundError, ContextLengthError."""
        cached = 0
        for prepared in self._read(document_id, messages, space):
            start, stop = prepared.context.spans[0]
            found = self._engine.cache.cached_tokens(
                prepared.tokens[:stop], tenant=space.tenant, cache_salt=space.cache_salt
            )
            cached += max(0, found - start)
        return cached

    def pin(self, document_id: str, messages: Sequence[Message], space: Space) -> int:
        """Returns the tokens of the pins. Raises as `warm`, and InvalidRequestError where there is no room for pins."""
        tokens = 0
        for prepared in self._read(document_id, messages, space):
            prefix = prepared.tokens[: prepared.context.spans[0][1]]
            pin = self._engine.cache.pin(prefix, tenant=space.tenant, cache_salt=space.cache_salt)
            tokens += pin.tokens
            with self._lock:
                self._pins.setdefault((space.owner, document_id), []).append((pin.id, space))
        return tokens

    def keep(self, document: Document, messages: Sequence[Message], space: Space) -> int:
        """Pin a document that is remembered as pinned, anew; returns the tokens of its pins.

        Raises InvalidRequestError where that cannot be. Then it is not remembered so any more.
        """
        self.unpin(document.id, space)
        try:
            return self.pin(document.id, messages, space)
        except InvalidRequestError as error:
            self.unpin(document.id, space)
            self._documents.put(space.owner, updated(document, {"pinned": False}))
            error.param = "pinned"
            error.args = (f"document '{document.id}' was added, but cannot be pinned: {error}",)
            raise

    def keep_again(
        self, document_id: str, messages_after: Callable[[str | None], Sequence[Message]], space: Space
    ) -> bool:
        """Pin a document that was pinned before a restart; False where there is no room, and the log says so.

        messages_after: those after a system prompt.
        """
        try:
            document = self._preparation.library.catalogue.get(space.owner, document_id).document
            self.unpin(document_id, space)
            self.pin(document_id, messages_after(document.system_prompt), space)
        except InvalidRequestError as error:  # a smaller pool than before, or the document has gone meanwhile
            log.warning("document %r is not pinned again: %s", document_id, error)
            return False
        return True

    def unpin(self, document_id: str, space: Space) -> None:
        """End a document's pins, if it has any."""
        for name, where in self.forget(document_id, space):
            self._engine.cache.unpin(name, tenant=where.tenant, cache_salt=where.cache_salt)

    def forget(self, document_id: str, space: Space) -> Sequence[tuple[str, Space]]:
        """No longer know a document's pins, which are returned."""
        with self._lock:
            return self._pins.pop((space.owner, document_id), [])

    def _read(self, document_id: str, messages: Sequence[Message], space: Space) -> Iterator[Prepared]:
        """Have each passage of a document computed alone, without an answer."""
        catalogue, epoch = self._preparation.library.catalogue, self._documents.epoch
        catalogue.get(space.owner, document_id)
        for passage in catalogue.passages_of(space.owner, document_id):
            prepared = self._preparation.compose(space, epoch, messages, [Retrieved(passage)], Wish())
            self._documents.note(space.owner, prepared.marks)
            params = SamplingParams(max_tokens=0)
            with self._engine.submit(
                prepared.tokens, params, tenant=space.tenant, cache_salt=space.cache_salt
            ) as stream:
                self._documents.verify(epoch, space.owner, prepared.marks)
                if epoch != self._documents.epoch:
                    self._preparation.forget([passage.key])
                for _ in stream:
                    pass
            yield prepared
