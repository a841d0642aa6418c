"""The answers' shapes of the document routes, and `rag` of a chat completion, for the OpenAPI description.

Invariant: as in `answers`: the routes build plain dictionaries, and the tests hold the two against each other.
"""

from __future__ import annotations

from typing import Literal

from stemcache.api.answers import Answer


class DocumentEntry(Answer):
    id: str
    object: Literal["document"]
    title: str
    metadata: dict[str, str | int | float | bool]
    version: int
    content_hash: str
    passages: int
    created_at: float
    updated_at: float
    expires_at: float | None
    pinned: bool
    system_prompt: str | None


class ChangedDocument(DocumentEntry):
    """PUT /v1/documents/{id}."""

    status: Literal["created", "updated", "unchanged"]
    forgotten_chunks: int


class DocumentAnswer(DocumentEntry):
    """GET /v1/documents/{id}."""

    text: str


class ChangedDocuments(Answer):
    """POST /v1/documents."""

    object: Literal["list"]
    data: list[ChangedDocument]


class DocumentList(Answer):
    """GET /v1/documents."""

    object: Literal["list"]
    data: list[DocumentEntry]
    has_more: bool
    total: int


class DeletedDocument(Answer):
    """DELETE /v1/documents/{id}."""

    id: str
    object: Literal["document"]
    deleted: bool
    forgotten_chunks: int


class DeletedDocuments(Answer):
    """DELETE /v1/documents."""

    object: Literal["list"]
    data: list[DeletedDocument]
