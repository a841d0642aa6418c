"""A Haystack retriever over a StemcacheDocumentStore."""

from __future__ import annotations

import asyncio
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.errors import FilterError

from stemcache.ragcache.plugins.haystack.document_store import StemcacheDocumentStore


@component
class StemcacheRetriever:
    """Passages of the store's documents, the nearest first. The server embeds the query: no embedder is needed.

    top_k: passages at most. filters: Haystack's, of which the server knows `==` and `in`, joined by `AND`.
    """

    def __init__(
        self, document_store: StemcacheDocumentStore, top_k: int = 4, filters: dict[str, Any] | None = None
    ) -> None:
        self.document_store = document_store
        self.top_k = top_k
        self.filters = filters

    def to_dict(self) -> dict[str, Any]:
        return default_to_dict(  # type: ignore[no-any-return]
            self, document_store=self.document_store, top_k=self.top_k, filters=self.filters
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StemcacheRetriever:
        return default_from_dict(cls, data)  # type: ignore[no-any-return]

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, top_k: int | None = None, filters: dict[str, Any] | None = None
    ) -> dict[str, list[Document]]:
        """`top_k` and `filters` stand for the constructor's. Raises FilterError, ServerAnswerError."""
        where = server_filter(self.filters if filters is None else filters)
        return {"documents": self.document_store.search(query, self.top_k if top_k is None else top_k, where)}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, top_k: int | None = None, filters: dict[str, Any] | None = None
    ) -> dict[str, list[Document]]:
        """As `run`."""
        return await asyncio.to_thread(self.run, query, top_k, filters)


def server_filter(filters: dict[str, Any] | None) -> dict[str, Any]:
    """Haystack's filters as the server's. Raises FilterError for those that the server does not know."""
    if not filters:
        return {}
    if filters.get("operator") == "AND":
        parts = [server_filter(each) for each in filters.get("conditions", ())]
        where = {name: value for part in parts for name, value in part.items()}
        if len(where) == sum(map(len, parts)):
            return where
    elif "field" in filters and filters.get("operator") in ("==", "in"):
        name, value = str(filters["field"]).removeprefix("meta."), filters.get("value")
        if isinstance(value, list) == (filters["operator"] == "in") and value is not None:
            return {name: value}
    raise FilterError(
        "the server's retrieval filters meta by '==' and 'in', each field once, joined by 'AND'; "
        f"{filters.get('operator')!r} here is another: retrieve more, or use document_store.filter_documents"
    )
