"""The routes under /v1/documents, and /v1/search: texts that chat completions can retrieve.

Invariant: a tenant sees and changes its own documents only. When a deletion or an update is answered, nothing that was
computed from the old content is left. The event loop never waits for the engine or the catalogue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Body, FastAPI, Query, Request

from stemcache.api import document_answers as answers
from stemcache.api.answers import documented
from stemcache.api.context import current
from stemcache.api.document_schemas import AddDocuments, DeleteQuery, DocumentFields, ListQuery, SearchDocuments
from stemcache.api.errors import NoDocumentServiceError
from stemcache.engine.errors import InvalidRequestError
from stemcache.ragcache.errors import NoDocumentsError

if TYPE_CHECKING:
    from stemcache.ragcache.context_cache import ContextCache
    from stemcache.ragcache.documents import Change, Document, Record, Retrieved
    from stemcache.ragcache.preparation import Space

Json = dict[str, Any]


def space_of(cache_salt: str | None = None) -> Space:
    """The running request's tenant, as documents know it: by name, since its id changes with the server's secret."""
    from stemcache.ragcache.preparation import Space

    tenant = current().tenant
    assert tenant is not None, "authentication comes before every route"
    return Space(tenant.name, tenant.id, (cache_salt or "").encode())


class DocumentRoutes:
    """The routes. `max_documents`: of one tenant."""

    def __init__(self, documents: ContextCache | None, *, max_documents: int) -> None:
        self._documents = documents
        self._max_documents = max_documents

    def add_to(self, app: FastAPI) -> None:
        app.post("/v1/documents", **documented(answers.ChangedDocuments))(self.add)
        app.get("/v1/documents", **documented(answers.DocumentList))(self.list)
        app.delete("/v1/documents", **documented(answers.DeletedDocuments))(self.delete_several)
        # Not under /v1/documents, where it would be a document of that name too.
        app.post("/v1/search", **documented(answers.FoundPassages))(self.search)
        app.get("/v1/documents/{document_id:path}", **documented(answers.DocumentAnswer))(self.get)
        app.put("/v1/documents/{document_id:path}", **documented(answers.ChangedDocument))(self.put)
        app.delete("/v1/documents/{document_id:path}", **documented(answers.DeletedDocument))(self.delete)

    async def add(self, body: AddDocuments, request: Request) -> Json:
        """Add documents, or change those with the same ids, in order. An error leaves those before it added."""
        given = [_document(fields.id, fields, f"documents[{at}].") for at, fields in enumerate(body.documents)]
        return {"object": "list", "data": await asyncio.to_thread(self._put, given, space_of())}

    async def put(self, document_id: str, body: Annotated[DocumentFields, Body()], request: Request) -> Json:
        """Add a document, or change the one with this id."""
        (changed,) = await asyncio.to_thread(self._put, [_document(document_id, body, "")], space_of())
        return changed

    async def list(self, query: Annotated[ListQuery, Query()], request: Request) -> Json:
        """The caller's documents in the order of their ids, with their texts if the query asks for them."""
        return await asyncio.to_thread(self._list, query, space_of())

    async def search(self, body: SearchDocuments, request: Request) -> Json:
        """The passages nearest to a query, as `rag` of a chat completion would retrieve them."""
        return await asyncio.to_thread(self._search, body, space_of())

    async def get(self, document_id: str, request: Request) -> Json:
        """A document with its text."""
        record = await asyncio.to_thread(self._service.get, document_id, space=space_of())
        return _with_text(record)

    async def delete(self, document_id: str, request: Request) -> Json:
        """Delete a document and all keys and values that were computed from it."""
        return await asyncio.to_thread(self._delete, document_id, space_of())

    async def delete_several(self, query: Annotated[DeleteQuery, Query()], request: Request) -> Json:
        """Delete the documents that the query names; none of them if one does not exist."""
        return {"object": "list", "data": await asyncio.to_thread(self._delete_all, query.id, space_of())}

    @property
    def _service(self) -> ContextCache:
        if self._documents is None:
            raise NoDocumentServiceError
        return self._documents

    def _put(self, documents: Sequence[Document], space: Space) -> Sequence[Json]:
        service = self._service
        if service.count(space=space) + len(documents) > self._max_documents:
            new = {each.id for each in documents if not service.has(each.id, space=space)}
            if service.count(space=space) + len(new) > self._max_documents:
                raise InvalidRequestError(
                    f"This server keeps {self._max_documents} documents of a tenant: delete some, or raise "
                    "--max-documents.",
                    param="documents",
                    code="document_limit_exceeded",
                )
        return [_changed(change) for change in service.add(documents, space=space)]

    def _list(self, query: ListQuery, space: Space) -> Json:
        found = self._service.list(after=query.after, limit=query.limit + 1, space=space)
        return {
            "object": "list",
            "data": [(_with_text if query.text else _entry)(record) for record in found[: query.limit]],
            "has_more": len(found) > query.limit,
            "total": self._service.count(space=space),
        }

    def _search(self, body: SearchDocuments, space: Space) -> Json:
        from stemcache.ragcache.preparation import Wish

        found: Sequence[Retrieved] = ()
        notes = []
        try:
            found = self._service.retrieve(body.query, Wish(k=body.k, where=body.filter), space=space)
        except NoDocumentsError as error:  # to find nothing is an answer here, as nobody wants to go on with it
            notes.append(str(error))
        except InvalidRequestError as error:
            error.param = error.param and error.param.removeprefix("rag.")
            raise
        return {"object": "list", "data": [_found(each) for each in found], "notes": notes}

    def _delete_all(self, names: Sequence[str], space: Space) -> Sequence[Json]:
        for name in names:
            self._service.get(name, space=space)
        return [self._delete(name, space) for name in dict.fromkeys(names)]

    def _delete(self, document_id: str, space: Space) -> Json:
        chunks = self._service.delete(document_id, space=space)
        return {"id": document_id, "object": "document", "deleted": True, "forgotten_chunks": chunks}


def _document(document_id: str, fields: DocumentFields, path: str) -> Document:
    """Raises DocumentError, with `path` before the name of the field."""
    from stemcache.ragcache.documents import Document
    from stemcache.ragcache.errors import DocumentError

    try:
        return Document(
            id=document_id,
            title=fields.title,
            text=fields.text,
            metadata=fields.metadata,
            expires_at=None if fields.ttl_seconds is None else time.time() + fields.ttl_seconds,
            pinned=fields.pinned,
            system_prompt=fields.system_prompt,
        )
    except DocumentError as error:
        error.param = f"{path}{error.param}"
        raise


def _entry(record: Record) -> Json:
    document = record.document
    return {
        "id": document.id,
        "object": "document",
        "title": document.title,
        "metadata": dict(document.metadata),
        "version": record.version,
        "content_hash": document.content_hash,
        "passages": record.passages,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
        "expires_at": document.expires_at,
        "pinned": document.pinned,
        "system_prompt": document.system_prompt,
    }


def _with_text(record: Record) -> Json:
    return _entry(record) | {"text": record.document.text}


def _found(retrieved: Retrieved) -> Json:
    passage = retrieved.passage
    return {
        "id": passage.document_id,
        "object": "document.passage",
        "passage": passage.position,
        "version": passage.version,
        "title": passage.title,
        "text": passage.text,
        "metadata": dict(passage.metadata),
        "score": retrieved.score,
    }


def _changed(change: Change) -> Json:
    return _entry(change.record) | {"status": change.status, "forgotten_chunks": change.forgotten_chunks}
