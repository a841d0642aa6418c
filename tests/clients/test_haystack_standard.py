"""Haystack's own tests of document stores, over the real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stemcache.api.server_process import ServerProcess

pytest.importorskip("haystack", reason="make test-clients installs it")

from haystack import Document
from haystack.document_stores.errors import DuplicateDocumentError
from haystack.document_stores.types import DuplicatePolicy
from haystack.testing.document_store import DocumentStoreBaseTests
from haystack.testing.document_store_async import (
    CountDocumentsAsyncTest,
    DeleteDocumentsAsyncTest,
    FilterDocumentsAsyncTest,
    WriteDocumentsAsyncTest,
)

from stemcache.ragcache.plugins.haystack import StemcacheDocumentStore


def comparable(documents: list[Document]) -> list[dict[str, object]]:
    """In the order of ids, as the server lists them, and without embeddings, which it makes itself."""
    fields = [{**each.to_dict(flatten=False), "embedding": None} for each in documents]
    return sorted(fields, key=lambda each: str(each["id"]))


class Standard:
    @pytest.fixture
    def document_store(self, server: ServerProcess) -> Iterator[StemcacheDocumentStore]:
        store = StemcacheDocumentStore(server.url)
        store.delete_documents([each.id for each in store.filter_documents()])
        yield store
        store.delete_documents([each.id for each in store.filter_documents()])

    @staticmethod
    def assert_documents_are_equal(received: list[Document], expected: list[Document]) -> None:
        assert comparable(received) == comparable(expected)


class TestStore(Standard, DocumentStoreBaseTests):
    def test_write_documents(self, document_store: StemcacheDocumentStore) -> None:
        """Which Haystack leaves to the store: without a policy nothing is overwritten."""
        document = Document(content="test doc")
        assert document_store.write_documents([document]) == 1
        with pytest.raises(DuplicateDocumentError):
            document_store.write_documents([document, Document(content="another")], policy=DuplicatePolicy.NONE)
        self.assert_documents_are_equal(document_store.filter_documents(), [document])


class TestAsyncStore(
    Standard,
    CountDocumentsAsyncTest,
    DeleteDocumentsAsyncTest,
    FilterDocumentsAsyncTest,
    WriteDocumentsAsyncTest,
):
    async def test_write_documents_async(self, document_store: StemcacheDocumentStore) -> None:
        document = Document(content="test doc")
        assert await document_store.write_documents_async([document]) == 1
        with pytest.raises(DuplicateDocumentError):
            await document_store.write_documents_async([document])
