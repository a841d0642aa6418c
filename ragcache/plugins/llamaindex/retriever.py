"""A LlamaIndex retriever over a server's documents."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.generic_utils import get_from_param_or_env
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import Document, NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from stemcache.ragcache.plugins.client import DEFAULT_URL, NO_KEY, FoundPassage, client_of, without_title


class StemcacheRetriever(BaseRetriever):
    """Passages of the documents that a server keeps, the nearest first.

    similarity_top_k: passages at most. filters: metadata that documents must have: `==` and `in`, joined by `and`.
    Methods raise ServerAnswerError, and ValueError for other filters.
    """

    def __init__(
        self,
        *,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        similarity_top_k: int = 4,
        filters: MetadataFilters | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._client = client_of(base_url, get_from_param_or_env("api_key", api_key, "STEMCACHE_API_KEY", NO_KEY))
        self.similarity_top_k = similarity_top_k
        self._where = None if filters is None else _server_filter(filters)

    def add_documents(self, documents: Sequence[Document]) -> list[str]:
        """Add documents, or change those with the same ids; returns their ids.

        A title in the metadata becomes the document's.
        """
        return [each["id"] for each in self._client.add([_as_server_document(document) for document in documents])]

    def delete(self, ids: Sequence[str]) -> None:
        """Delete documents, and all keys and values that were computed from them. Unknown ids are left alone."""
        for each in ids:
            self._client.delete(each)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._client.search(query_bundle.query_str, self.similarity_top_k, self._where)
        return [NodeWithScore(node=_node(each), score=each.score) for each in found]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _as_server_document(document: Document) -> dict[str, Any]:
    title, metadata = without_title(document.metadata)
    return {"id": document.doc_id, "title": title, "text": document.text, "metadata": metadata}


def _node(found: FoundPassage) -> TextNode:
    metadata = found.metadata_with_title
    return TextNode(
        id_=found.id,
        text=found.text,
        metadata=metadata,
        # The model is given what the server would give it: title and text.
        excluded_llm_metadata_keys=list(metadata),
        excluded_embed_metadata_keys=list(metadata),
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=found.document_id)},
    )


def _server_filter(filters: MetadataFilters) -> dict[str, Any]:
    where: dict[str, Any] = {}
    for each in filters.filters:
        plain = isinstance(each, MetadataFilter) and each.operator in (FilterOperator.EQ, FilterOperator.IN)
        if not plain or filters.condition not in (None, FilterCondition.AND) or each.key in where:
            raise ValueError(
                "the server's retrieval filters by '==' and 'in', each key once, joined by 'and'; for other filters "
                "retrieve more nodes, and drop some in a node postprocessor"
            )
        where[each.key] = each.value
    return where
