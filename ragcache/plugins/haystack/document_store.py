"""A Haystack document store over a server's documents.

Invariant: what is read is what was written, but for embeddings, which are the server's business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from haystack import Document, default_from_dict, default_to_dict
from haystack.document_stores.errors import DuplicateDocumentError
from haystack.document_stores.types import DuplicatePolicy
from haystack.errors import FilterError
from haystack.utils import Secret
from haystack.utils.filters import document_matches_filter

from stemcache.ragcache.plugins.client import (
    DEFAULT_URL,
    DocumentsClient,
    FoundPassage,
    client_of,
    with_title,
    without_title,
)

log = logging.getLogger(__name__)


class StemcacheDocumentStore:
    """The documents of a server, of the key that is given.

    api_key: STEMCACHE_API_KEY of the environment unless given, none where that is not set.
    Methods raise ServerAnswerError.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: Secret = Secret.from_env_var("STEMCACHE_API_KEY", strict=False),  # noqa: B008  (Haystack's way)
    ) -> None:
        self.base_url = base_url
        self.api_key = api_key

    def to_dict(self) -> dict[str, Any]:
        """Without the key: with the name of the variable that holds it."""
        return default_to_dict(self, base_url=self.base_url, api_key=self.api_key)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StemcacheDocumentStore:
        return default_from_dict(cls, data)  # type: ignore[no-any-return]

    def count_documents(self) -> int:
        """How many documents there are."""
        return self._client.count()

    def filter_documents(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """The documents that pass `filters`, in the order of their ids.

        All documents are read for it, as Haystack's filters say more than the server's. Raises FilterError.
        """
        if filters and "operator" not in filters:
            raise FilterError("filters are a comparison or a logical condition: see Haystack's metadata filtering")
        found = (_document(each["id"], each["text"], each["title"], each["metadata"]) for each in self._client.all())
        return [each for each in found if not filters or document_matches_filter(filters, each)]

    def write_documents(self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE) -> int:
        """Write documents; returns how many were. NONE means FAIL, which looks before anything is written.

        A title in the meta becomes the document's. Raises DuplicateDocumentError, and ValueError for what is no text.
        """
        if not isinstance(documents, list) or not all(isinstance(each, Document) for each in documents):
            raise ValueError("write_documents takes a list of Haystack's documents")
        wanted = [_as_server_document(each) for each in documents]
        if any(each.embedding is not None or each.sparse_embedding is not None for each in documents):
            log.warning("embeddings of documents are not kept: the server embeds texts itself")
        if policy is not DuplicatePolicy.OVERWRITE:
            known = {name for name in {each["id"] for each in wanted} if self._client.has(name)}
            if known and policy is not DuplicatePolicy.SKIP:
                raise DuplicateDocumentError(f"there is a document '{min(known)}' already; choose another policy")
            wanted = [each for each in wanted if each["id"] not in known]
        self._client.add(wanted)
        return len(wanted)

    def delete_documents(self, document_ids: list[str]) -> None:
        """Delete documents, and all keys and values that were computed from them. Unknown ids are left alone."""
        for each in document_ids:
            self._client.delete(each)

    def search(self, query: str, top_k: int, where: Mapping[str, Any] | None = None) -> list[Document]:
        """Up to `top_k` passages, the nearest first, each with its score.

        `meta` of the second and further passages of a split document tells whose they are, as Haystack's splitter does:
        `source_id` and `split_id`. where: as the server filters, docs/documents.md.
        """
        return [_passage(each) for each in self._client.search(query, top_k, where)]

    async def count_documents_async(self) -> int:
        """As `count_documents`; so do the others."""
        return await asyncio.to_thread(self.count_documents)

    async def filter_documents_async(self, filters: dict[str, Any] | None = None) -> list[Document]:
        return await asyncio.to_thread(self.filter_documents, filters)

    async def write_documents_async(
        self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE
    ) -> int:
        return await asyncio.to_thread(self.write_documents, documents, policy)

    async def delete_documents_async(self, document_ids: list[str]) -> None:
        await asyncio.to_thread(self.delete_documents, document_ids)

    @property
    def _client(self) -> DocumentsClient:
        return client_of(self.base_url, self.api_key.resolve_value())


def _as_server_document(document: Document) -> dict[str, Any]:
    if document.content is None:
        raise ValueError(f"document {document.id} has no text, and the server keeps texts: convert it first")
    title, metadata = without_title(document.meta)
    return {"id": document.id, "title": title, "text": document.content, "metadata": metadata}


def _passage(found: FoundPassage) -> Document:
    split = {"source_id": found.document_id, "split_id": found.position} if found.position else {}
    return _document(found.id, found.text, found.title, {**found.metadata, **split}, found.score)


def _document(name: str, text: str, title: str, metadata: Mapping[str, Any], score: float | None = None) -> Document:
    return Document(id=name, content=text, meta=with_title(metadata, title), score=score)
