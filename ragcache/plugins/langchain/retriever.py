"""A LangChain retriever over a server's documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.utils import secret_from_env
from pydantic import Field, SecretStr

from stemcache.ragcache.plugins.client import DEFAULT_URL, NO_KEY, DocumentsClient, client_of, without_title


class StemcacheRetriever(BaseRetriever):
    """Passages of the documents that a server keeps, the nearest first, each with its `score` in the metadata.

    k: passages at most; may be given to `invoke` too. filter: metadata that documents must have.
    Methods raise ServerAnswerError.
    """

    base_url: str = DEFAULT_URL
    api_key: SecretStr | None = Field(default_factory=secret_from_env("STEMCACHE_API_KEY", default=NO_KEY))
    k: int = 4
    filter: dict[str, Any] | None = None

    @property
    def _client(self) -> DocumentsClient:
        return client_of(self.base_url, self.api_key and self.api_key.get_secret_value())

    def add_documents(self, documents: Sequence[Document]) -> list[str]:
        """Add documents, or change those with the same ids; returns their ids.

        A title in the metadata becomes the document's. A document without an id gets one from its content.
        """
        return [each["id"] for each in self._client.add([_as_server_document(document) for document in documents])]

    def delete(self, ids: Sequence[str]) -> None:
        """Delete documents, and all keys and values that were computed from them. Unknown ids are left alone."""
        for each in ids:
            self._client.delete(each)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        filter: dict[str, Any] | None = None,
    ) -> list[Document]:
        found = self._client.search(query, self.k if k is None else k, self.filter if filter is None else filter)
        return [
            Document(
                id=each.id,
                page_content=each.text,
                metadata={**each.metadata_with_title, "document_id": each.document_id, "score": each.score},
            )
            for each in found
        ]


def _as_server_document(document: Document) -> dict[str, Any]:
    title, metadata = without_title(document.metadata)
    return {"id": document.id, "title": title, "text": document.page_content, "metadata": metadata}
