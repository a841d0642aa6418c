"""The document store: documents that can be found, and the trail that they leave in the engine's cache.

Invariant: whoever computes with a passage follows four steps: read `epoch`, read the passage, `note` its footprints,
submit, `verify`. Whoever changes a passage: change the catalogue, count the epoch up, `clean`. Whatever the order in
which the steps of two threads fall, either the change finds the footprint, or `verify` finds the change.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from stemcache.engine.cache import Cache
from stemcache.prefixtree.errors import TierError
from stemcache.prefixtree.footprint import Footprint
from stemcache.ragcache.catalogue import Catalogue
from stemcache.ragcache.documents import Change, Document
from stemcache.ragcache.errors import DocumentNotFoundError
from stemcache.ragcache.library import Library

log = logging.getLogger(__name__)

Notes = Sequence[tuple[int, Footprint]]

# Footprints of what was evicted are of no use. Every so many notes they are looked for, among those not noted for an
# hour: no request takes so long from its preparation to its start.
SWEEP_EVERY: Final = 1 << 14
_SETTLED_SECONDS: Final = 3600.0

_RETRY_SECONDS: Final = 5.0
"""Between two attempts to have a tier forget that did not answer."""


class DocumentStore:
    """Changes of documents, and what they mean for the cache. From any thread.

    removed: is told of content that is no more, before what was computed from it goes: owner, document, its passages.
    """

    def __init__(
        self,
        cache: Cache,
        library: Library,
        *,
        clock: Callable[[], float] = time.time,
        removed: Callable[[str, str, Sequence[int]], None] = lambda owner, document_id, keys: None,
    ) -> None:
        self._cache = cache
        self._library = library
        self._catalogue: Catalogue = library.catalogue
        self._trail = library.catalogue.trail
        self._clock = clock
        self._removed = removed
        self._lock = threading.Lock()
        self._epoch = 0
        self._noted = 0
        self._clean_at = 0.0  # when to try again what a tier has kept from being forgotten
        self._clean_or_owe()  # what a crash has left

    @property
    def epoch(self) -> int:
        """Counts the changes of passages."""
        return self._epoch

    def put(self, owner: str, document: Document) -> Change:
        """Add a document or change the one with its id.

        Raises EmbedderError, CatalogueError, EngineClosedError, TierError.
        """
        stored = self._library.put(owner, document)
        gone = self._changed(owner, document.id, stored.removed) if stored.removed else 0
        return Change(stored.record, stored.status, gone)

    def delete(self, owner: str, document_id: str) -> int:
        """Delete a document; returns how many chunks went with it. Raises DocumentNotFoundError and as `put`."""
        return self._changed(owner, document_id, self._library.delete(owner, document_id))

    def expire(self) -> None:
        """Delete the documents whose time is over, and what a tier that did not answer still owes."""
        if 0.0 < self._clean_at <= self._clock():
            self._clean_or_owe()
        for owner, document_id in self._catalogue.expired():
            try:
                self.delete(owner, document_id)
            except DocumentNotFoundError:  # another thread was faster
                continue
            except TierError as error:
                log.warning("%s", error)
                continue
            log.info("a document's time was over, it was deleted")

    def note(self, owner: str, notes: Notes) -> None:
        """Remember where passages stand in a prompt that is about to be submitted."""
        if notes:
            self._trail.note(owner, notes)
            self._noted += len(notes)
            if self._noted >= SWEEP_EVERY:
                self._noted = 0
                self.sweep()

    def verify(self, epoch: int, owner: str, notes: Notes) -> None:
        """After a prompt was submitted that was prepared at `epoch`: forget what was changed in between."""
        if notes and epoch != self._epoch:
            self._trail.note(owner, notes)
            self._clean_or_owe()

    def clean(self) -> int:
        """Have the cache forget what was computed from content that is no more; returns how many chunks it were.

        Raises TierError if a tier did not answer: it is done again by `expire`, until it does, also after a restart.
        """
        self._clean_at = self._clock() + _RETRY_SECONDS
        doomed = self._trail.doomed()
        done = self._cache.forget(set(doomed.values()))
        self._trail.confirm(doomed)
        self._clean_at = 0.0
        return done.chunks

    def sweep(self) -> None:
        """Drop footprints of what is not cached any more."""
        settled = self._clock() - _SETTLED_SECONDS
        footprints = self._trail.footprints(noted_before=settled)
        held = self._cache.held(footprints)
        self._trail.drop_footprints([each for each in footprints if each not in held], settled)

    def _changed(self, owner: str, document_id: str, keys: Sequence[int]) -> int:
        with self._lock:
            self._epoch += 1
        self._removed(owner, document_id, keys)
        try:
            return self.clean()
        except TierError as error:
            raise TierError(f"the documents are changed, but {error}; this is done by itself") from error

    def _clean_or_owe(self) -> None:
        try:
            self.clean()
        except TierError as error:
            log.warning("what was computed from deleted documents is not gone yet: %s", error)
