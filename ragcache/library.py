"""The library: documents that can be found. Catalogue, splitter, embedder and vector indexes as one.

Invariant: an owner's index holds exactly the passages of the catalogue. It is changed after the catalogue's transaction
and made anew from it at a start. Each owner has an index of its own, so no search depends on others' documents.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from stemcache.ragcache.catalogue import Catalogue, Filter, Stored, Vectors
from stemcache.ragcache.documents import Document, Retrieved
from stemcache.ragcache.embedders import Embedder
from stemcache.ragcache.errors import EmbedderError
from stemcache.ragcache.index import Found, Kind, VectorIndex, load_index, new_index
from stemcache.ragcache.splitter import Splitter


class Library:
    """Documents of any number of owners. From any thread.

    folder: where indexes are saved beside the catalogue; None for nowhere.
    Raises EmbedderError if the catalogue's vectors are another embedder's.
    """

    def __init__(
        self, catalogue: Catalogue, embedder: Embedder, splitter: Splitter, kind: Kind, folder: Path | None = None
    ) -> None:
        self.catalogue = catalogue
        self._embedder = embedder
        self._splitter = splitter
        self._kind: Kind = kind
        self._folder = folder
        self._writing = threading.Lock()  # held while texts are embedded, which searches need not wait for
        self._lock = threading.RLock()
        self._indexes: dict[str, VectorIndex] = {}
        known = catalogue.database.get_setting("embedder")
        if known not in (None, embedder.name):
            raise EmbedderError(
                f"the documents were embedded by {known}, whose vectors are not those of {embedder.name}: choose "
                "that embedder, or add the documents to a new folder"
            )
        catalogue.database.set("embedder", embedder.name)

    def put(self, owner: str, document: Document) -> Stored:
        """Add a document or change the one with its id. Raises EmbedderError, CatalogueError: nothing changed then."""
        with self._writing:
            known = self.catalogue.find(owner, document.id)
            passages: list[str] = []
            if known is None or known.document.content_hash != document.content_hash:
                passages = self._splitter.split(document.text)
            # The title is part of what a passage is about.
            vectors = self._embedder.embed_documents([f"{document.title}\n{text}".strip() for text in passages])
            with self._lock:
                index = self._index(owner)
                stored = self.catalogue.put(owner, document, passages, vectors)
                index.remove(stored.removed)
                if stored.added:
                    index.add(stored.added, vectors)
        return stored

    def delete(self, owner: str, document_id: str) -> list[int]:
        """Returns the keys of its passages. Raises DocumentNotFoundError, CatalogueError."""
        with self._writing, self._lock:
            index = self._index(owner)
            removed = self.catalogue.delete(owner, document_id)
            index.remove(removed)
        return removed

    def search(self, owner: str, question: str, k: int, where: Filter | None = None) -> list[Retrieved]:
        """Up to `k` passages, the nearest first. Raises EmbedderError."""
        (found,) = self.stages(owner, question, k, where, whole=True)
        return found

    def stages(
        self, owner: str, question: str, k: int, where: Filter | None = None, *, whole: bool = False
    ) -> Iterator[list[Retrieved]]:
        """`search` in steps: what is known so far, and at last the result. Changes meanwhile may show or not.

        The question is embedded by this call, the rest is the iterator's. whole: search at once, in one step.
        """
        allowed = None if not where else self.catalogue.keys_where(owner, where)
        return self._searched(owner, self._embedder.embed_question(question), k, allowed, whole)

    def save(self) -> None:
        """Write the indexes beside the catalogue, so that the next start need not make them."""
        if self._folder is None:
            return
        with self._lock:
            for old in self._folder.glob("index-*.faiss"):
                old.unlink()
            for owner, index in self._indexes.items():
                if len(index):
                    partial = self._folder / "index.partial"
                    index.save(partial)
                    partial.replace(self._file(owner))

    def _searched(
        self, owner: str, vector: Vectors, k: int, allowed: Sequence[int] | None, whole: bool
    ) -> Iterator[list[Retrieved]]:
        with self._lock:
            index = self._index(owner)
            stages = iter([index.search(vector, k, allowed)]) if whole else index.stages(vector, k, allowed)
        while True:
            with self._lock:
                found = next(stages, None)
            if found is None:
                return
            yield self._retrieved(owner, found)

    def _retrieved(self, owner: str, found: Sequence[Found]) -> list[Retrieved]:
        scores = {each.key: each.score for each in found}
        passages = self.catalogue.passages(owner, [each.key for each in found])
        return [Retrieved(passage, scores[passage.key]) for passage in passages]

    def _index(self, owner: str) -> VectorIndex:
        if owner not in self._indexes:
            dimensions = self._embedder.dimensions
            index = None if self._folder is None else load_index(self._kind, dimensions, self._file(owner))
            keys, vectors = self.catalogue.vectors(owner, dimensions)
            if index is None or len(index) != len(keys):
                index = new_index(self._kind, dimensions)
                if len(keys):
                    index.add(keys, np.ascontiguousarray(vectors))
            self._indexes[owner] = index
        return self._indexes[owner]

    def _file(self, owner: str) -> Path:
        """Named by what it is made of: after any change of the catalogue it is another file."""
        assert self._folder is not None
        name = hashlib.sha256(f"{self._kind} {self._embedder.name} {owner}".encode()).hexdigest()[:24]
        return self._folder / f"index-{name}-{self.catalogue.generation}.faiss"
